"""A photograph as a matrix, offline: scikit-learn ships it."""

import torch
from torch import Tensor


def photograph() -> Tensor:
    """A photograph as a matrix of grey values: grey = 0.299·R + 0.587·G + 0.114·B.

    Returns:
        Grey values, shape (427, 640), float64, in [0, 1]: 0 is black, 1 is white.

    Example:
        >>> grey = photograph()
        >>> tuple(grey.shape), grey.dtype
        ((427, 640), torch.float64)

    Source:
        "China" by danielbuechele (2011 or earlier), CC BY 2.0, through sklearn.datasets.load_sample_image; the
        weights of the colours are those of ITU-R BT.601.
    """
    from sklearn.datasets import load_sample_image

    rgb = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float64) / 255
    return rgb @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
