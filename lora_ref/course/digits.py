"""Handwritten digits, offline: scikit-learn ships them. With two shifts of the input, to fine-tune to."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images X (N, 64) float32 in [0, 1], labels y (N,) int64, cut in three.

    Args:
        X_train: the images to train on.
        y_train: their labels.
        X_val: the images to choose settings by.
        y_val: their labels.
        X_test: the images to report on.
        y_test: their labels.

    Example:
        >>> digits = load_digits()
        >>> two = digits.only([7, 2])  # 7 becomes class 0, 2 becomes class 1
        >>> two.y_test.unique().tolist(), tuple(digits.map(faded).X_val.shape)
        ([0, 1], (300, 64))
    """

    X_train: Tensor
    y_train: Tensor
    X_val: Tensor
    y_val: Tensor
    X_test: Tensor
    y_test: Tensor

    def map(self, transform) -> "Digits":
        """The same split with `transform` applied to every (n, 8, 8) stack of images."""
        X = [transform(x.view(-1, 8, 8)).reshape(-1, 64) for x in (self.X_train, self.X_val, self.X_test)]
        return Digits(X[0], self.y_train, X[1], self.y_val, X[2], self.y_test)

    def only(self, labels: list[int]) -> "Digits":
        """Only the images of these digits, relabelled 0, 1, … in the order given."""
        parts = []
        for x, y in ((self.X_train, self.y_train), (self.X_val, self.y_val), (self.X_test, self.y_test)):
            keep = torch.isin(y, torch.tensor(labels))
            parts += [x[keep], torch.tensor([labels.index(int(label)) for label in y[keep]])]
        return Digits(*parts)


def load_digits(seed: int = 0) -> Digits:
    """The 1,797 digits of 8×8 pixels of the UCI optical recognition set, split 1,197 / 300 / 300.

    Pixels, 0 … 16 in the file, are divided by 16.

    Args:
        seed: of the permutation that makes the split; the global generator is not used.

    Returns:
        The three parts, for training, validation and test.

    Example:
        >>> digits = load_digits()
        >>> len(digits.X_train), len(digits.X_val), len(digits.X_test)
        (1197, 300, 300)
        >>> digits.X_train.min().item(), digits.X_train.max().item()
        (0.0, 1.0)

    Source:
        E. Alpaydin & C. Kaynak 1998 (CC BY 4.0), through sklearn.datasets.load_digits.
    """
    from sklearn.datasets import load_digits as load

    X, y = load(return_X_y=True)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    X = torch.tensor(X, dtype=torch.float32)[order] / 16
    y = torch.tensor(y, dtype=torch.int64)[order]
    return Digits(X[:1197], y[:1197], X[1197:1497], y[1197:1497], X[1497:], y[1497:])


def tilted(images: Tensor, degrees: float) -> Tensor:
    """Images turned anticlockwise about their middle, as a page lying askew in a scanner.

    Bilinear interpolation; what comes from outside the image is 0, the paper.

    Args:
        images: shape (n, 8, 8), of a floating-point type.
        degrees: the angle in degrees, any finite number; below 0 turns clockwise.

    Returns:
        The turned images, of the same shape and type.

    Example:
        >>> images = torch.zeros(1, 8, 8)
        >>> images[0, 1, 6] = 1.0  # ink in the upper right corner
        >>> tilted(images, 90.0)[0].round().nonzero().tolist()  # now in the upper left one
        [[1, 1]]
    """
    a = math.radians(degrees)
    turn = images.new_tensor([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]])
    where = torch.nn.functional.affine_grid(turn.expand(len(images), 2, 3), (len(images), 1, 8, 8), align_corners=False)
    return torch.nn.functional.grid_sample(images[:, None], where, align_corners=False)[:, 0]


def faded(images: Tensor) -> Tensor:
    """Images as a scanner with poor contrast gives them: 0.3 + 0.4·x.

    Args:
        images: shape (n, 8, 8), or any other, in [0, 1].

    Returns:
        The faded images, of the same shape, in [0.3, 0.7].

    Example:
        >>> faded(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.3000, 0.5000, 0.7000])
    """
    return 0.3 + 0.4 * images
