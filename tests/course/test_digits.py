"""course/digits.py: the digits are what scikit-learn ships, split without overlap."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from lora_ref.course.digits import faded, load_digits, tilted

PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def parts(digits):
    return [(getattr(digits, f"X_{part}"), getattr(digits, f"y_{part}")) for part in PARTS]


def rows(X, y):
    """Every image with its label, as sorted tuples of integers: a multiset."""
    return sorted(map(tuple, np.column_stack([np.asarray(X), np.asarray(y)]).astype(int).tolist()))


def test_the_split_has_its_sizes_types_and_range(digits):
    assert [tuple(X.shape) for X, _ in parts(digits)] == [(1197, 64), (300, 64), (300, 64)]
    for X, y in parts(digits):
        assert X.dtype == torch.float32 and y.dtype == torch.int64 and len(X) == len(y)
        assert X.min() == 0 and X.max() == 1
        assert sorted(set(y.tolist())) == list(range(10))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_three_parts_are_the_whole_file_each_image_once_with_its_label(seed):
    three = parts(load_digits(seed))
    X, y = (torch.cat([part[i] for part in three]) for i in (0, 1))
    assert rows(16 * X, y) == rows(*sklearn_digits(return_X_y=True))


def test_the_seed_alone_decides_the_split(digits, rng_untouched):
    assert torch.equal(load_digits(0).X_test, digits.X_test)
    assert not torch.equal(load_digits(1).X_test, digits.X_test)


def test_map_transforms_every_image_and_leaves_labels_and_the_original_alone(digits):
    before = digits.X_train.clone()
    turned = digits.map(lambda images: images.mT)
    for (X, y), (X2, y2) in zip(parts(digits), parts(turned)):
        assert X2.shape == X.shape and torch.equal(y2, y)
        np.testing.assert_array_equal(X2[5].view(8, 8).numpy(), X[5].view(8, 8).numpy().T)
        assert not torch.equal(X2, X)
    assert torch.equal(digits.X_train, before)


def test_only_keeps_these_digits_and_numbers_them_in_the_order_given(digits):
    two = digits.only([7, 2])
    for (X, y), (X2, y2) in zip(parts(digits), parts(two)):
        assert y2.dtype == torch.int64 and set(y2.tolist()) == {0, 1}
        assert len(X2) == len(y2) == ((y == 7) | (y == 2)).sum()
        assert torch.equal(X2[y2 == 0], X[y == 7]) and torch.equal(X2[y2 == 1], X[y == 2])


def test_tilting_by_quarter_turns_goes_anticlockwise(digits):
    images = digits.X_train[:20].view(-1, 8, 8)
    for quarters in (-1, 0, 1, 2):
        turned = np.rot90(images.numpy(), quarters, axes=(1, 2))  # numpy turns from rows to columns: anticlockwise
        np.testing.assert_allclose(tilted(images, 90 * quarters).numpy(), turned, atol=1e-5)


def test_a_small_tilt_moves_ink_anticlockwise_keeps_most_of_it_and_brings_in_paper():
    images = torch.zeros(1, 8, 8)
    images[0, 3:5, 6] = 1.0  # ink right of the middle: (row, column) around (3.5, 6)
    turned = tilted(images, 20.0)[0]
    rows = (turned.sum(1) * torch.arange(8.0)).sum() / turned.sum()
    assert 2.3 < rows < 3.0  # up by 2.5·sin 20° = 0.86
    assert turned.sum() == pytest.approx(2, abs=0.2)
    assert tilted(torch.ones(1, 8, 8), 45.0)[0, 0, 0] == 0


def test_faded_images_keep_their_order_between_3_and_7_tenths():
    assert faded(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.3, 0.5, 0.7])


def test_digits_cannot_be_changed_by_accident(digits):
    with pytest.raises(dataclasses.FrozenInstanceError):
        digits.X_train = None
