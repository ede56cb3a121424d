"""What the tests of the experiments share: the shipped model, and the shapes of a model's linear layers."""

import torch

from lora_ref.course.text.language_model import language_model

SHIPPED, TOKENIZER = language_model()


def title(arm):
    return f"{arm.experiment}/{arm.name}"


def linear(model):
    """Path → (d, k) of the linear layers of the blocks."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in path}
    return {path: tuple(m.weight.shape) for path, m in layers.items()}
