"""What a fine-tuning run learns and is evaluated by: data-to-text, or the classification of one or two sentences.

A task has the examples of its three parts as rows of token ids, and computes the loss of a batch, a step's shares of
it, the loss on held-out rows and the measures of a trained model. Batches are padded; padding is masked in the
attention and not scored.
"""

from ..config import Profile
from .classification import ClassificationTask
from .data_to_text import DataToTextTask, verbatim_slot_errors
from .task import Task

__all__ = ["ClassificationTask", "DataToTextTask", "Task", "make_task", "verbatim_slot_errors"]


def make_task(tokenizer, profile: Profile) -> Task:
    """The profile's task on its data. Errors: ValueError and those of load_tables, before any training."""
    return (DataToTextTask if profile.data.task == "data-to-text" else ClassificationTask)(tokenizer, profile)
