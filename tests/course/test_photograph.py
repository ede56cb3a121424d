"""course/photograph.py: the photograph is the grey of what scikit-learn ships."""

import pytest
import torch
from sklearn.datasets import load_sample_image

from lora_ref.course.photograph import photograph


def test_the_photograph_is_the_grey_of_its_colours():
    grey, rgb = photograph(), load_sample_image("china.jpg")
    assert grey.shape == (427, 640) and grey.dtype == torch.float64
    assert 0 <= grey.min() < 0.1 and 0.9 < grey.max() <= 1
    for i, j in ((0, 0), (200, 300), (426, 639), (10, 500)):
        r, g, b = (int(x) for x in rgb[i, j])
        assert grey[i, j].item() == pytest.approx((0.299 * r + 0.587 * g + 0.114 * b) / 255)
