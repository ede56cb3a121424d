"""One arm of a comparison: where it runs, its adapter, its model as it is trained, and whether all of that fits."""

import os

import torch
from torch import nn

from ...batched import add_batched_lora
from ...config import LoRAConfig
from ...matching import plan_lora
from ...model import add_lora
from .config import AdapterSettings, Profile, SystemSettings
from .tasks import Task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(system: SystemSettings):
    """An Accelerator for the profile's device and precision, in the launcher's processes or this one.

    "cuda" is any GPU: under `accelerate launch` each process takes its own. Errors: ValueError for "cuda" where there
    is none, and for fp16 on a CPU.
    """
    if system.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device = 'cuda', but torch sees no GPU. --profile cpu-mini is made for a CPU; --device cpu runs this one "
            "there all the same, which may take days"
        )
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    launched = "WORLD_SIZE" in os.environ
    if AcceleratorState._shared_state or PartialState._shared_state:  # one run after another, with other settings
        AcceleratorState._reset_state(reset_partial_state=not launched)
    cpu = system.device == "cpu"
    if system.precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise ValueError("precision = 'fp16' needs a GPU; choose 'bf16' or 'fp32'")
    return Accelerator(cpu=cpu, mixed_precision="no" if system.precision == "fp32" else system.precision)


def lora_config(arm: str, adapter: AdapterSettings, head_modules: list[str] | None = None) -> LoRAConfig | None:
    """The arm's adapter; None for full fine-tuning. `head_modules` are trained in full beside it."""
    if arm == "full":
        return None
    return LoRAConfig(
        r=int(arm.removeprefix("r=")),
        lora_alpha=adapter.lora_alpha,
        target_modules="all-linear" if adapter.target_modules == ("all-linear",) else list(adapter.target_modules),
        lora_dropout=adapter.lora_dropout,
        use_rslora=adapter.use_rslora,
        modules_to_save=head_modules,
    )


def prepare_model(
    model: nn.Module, config: LoRAConfig | list[LoRAConfig] | None, system: SystemSettings, seed: int
) -> nn.Module:
    """The model as it is trained: adapted (its frozen weights in the profile's type) or whole, checkpointing or not.

    A list of configs makes adapters side by side, each of which begins as it does alone.
    """
    if config is None:
        model.requires_grad_(True)
    else:
        for parameter in model.parameters():  # not the buffers: 16 bits would spoil the positions' frequencies
            parameter.data = parameter.data.to(DTYPES[system.frozen_dtype])
        if isinstance(config, list):
            add_batched_lora(model, config, [torch.Generator().manual_seed(seed) for _ in config])
        else:
            add_lora(model, config, generator=torch.Generator().manual_seed(seed))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if system.gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # transformers 5's name for it
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def check_model(model: nn.Module, tokenizer, task: Task, profile: Profile) -> None:
    """Refuse what would fail later; nothing is changed.

    Errors: ValueError for a tokeniser with more tokens than the model has, examples longer than it can read, targets
    that it lacks, a rank above a layer's, checkpointing that it cannot do.
    """
    system = profile.system
    _check_vocabulary(model, tokenizer)
    _check_lengths(model, task, profile)
    if profile.data.task == "classification" and system.frozen_dtype != "fp32" and system.precision == "fp32":
        raise ValueError(
            f"frozen_dtype = {system.frozen_dtype!r} needs precision = {system.frozen_dtype!r} in a classifier, got "
            "'fp32'"
        )
    for arm in profile.optimisation.arms:
        if (config := lora_config(arm, profile.adapter, task.head_modules)) is not None:
            _check_adapter(model, arm, config, profile.optimisation.parallel_adapters)
    if system.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(model).__name__} supports no gradient checkpointing; leave gradient_checkpointing false"
        )


def _check_vocabulary(model: nn.Module, tokenizer) -> None:
    rows, tokens = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if tokens > rows:
        raise ValueError(
            f"the tokeniser has {tokens:,} tokens, the model's embeddings {rows:,} rows; save the model's own "
            "tokeniser beside it, or model.resize_token_embeddings(len(tokenizer))"
        )


def _check_lengths(model: nn.Module, task: Task, profile: Profile) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return
    if "roberta" in model.config.model_type:  # its positions start after the padding token's
        positions -= model.config.pad_token_id + 1
    lengths = {"max_length": profile.data.max_length}
    if profile.data.task == "data-to-text":
        lengths["max_new_tokens and the longest prompt"] = task.longest_sequence()
    for name, value in lengths.items():
        if value > positions:
            raise ValueError(f"{name} = {value} tokens, but {profile.base.model} reads at most {positions}; lower it")


def _check_adapter(model: nn.Module, arm: str, config: LoRAConfig, parallel_adapters: int) -> None:
    for path, layer_config in plan_lora(model, config).layers.items():
        layer = model.get_submodule(path)
        smallest = min(layer.weight.shape)
        if layer_config.r > smallest:
            raise ValueError(f"arms has {arm!r}, but {path} has rank {smallest} at most; lower it")
        if parallel_adapters > 1 and not isinstance(layer, nn.Linear):
            raise ValueError(
                f"parallel_adapters = {parallel_adapters}, but {path} is a {type(layer).__name__}, and parallel "
                "adapters are for nn.Linear; choose parallel_adapters = 1"
            )
