"""A photograph as a matrix, offline: scikit-learn ships it."""

import torch
from torch import Tensor


def photograph() -> Tensor:
    """A photograph as a matrix: grey values (427, 640) float64 in [0, 1].

    "China" by danielbuechele (2011 or earlier), CC BY 2.0, through
    sklearn.datasets.load_sample_image; grey = 0.299·R + 0.587·G + 0.114·B (ITU-R BT.601).
    """
    from sklearn.datasets import load_sample_image

    rgb = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float64) / 255
    return rgb @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
