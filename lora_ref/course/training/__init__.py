"""One training run of one model: `train`, with checkpoints, resuming and several processes."""

from .history import Diverged, History
from .loop import train

__all__ = ["Diverged", "History", "train"]
