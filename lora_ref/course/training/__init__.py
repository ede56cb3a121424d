"""One training run of one model: `train`, with checkpoints, resuming and several processes."""

from .loop import train
from .state import History

__all__ = ["History", "train"]
