"""The fine-tuning command, python -m lora_ref.course.finetune, and the same as a function."""

from .experiment import finetune

__all__ = ["finetune"]
