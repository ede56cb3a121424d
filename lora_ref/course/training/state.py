"""The state of a training run, and one step of it: forward, backward, clipping, AdamW."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from ..._checks import check_integer, check_positive
from ...measure import peak_bytes
from .history import Diverged, Progress
from .schedule import lr_factor

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainSettings:
    """The numbers that `train` was called with. Errors: ValueError, TypeError for one that is out of range."""

    steps: int
    lr: float
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    eval_steps: int = 100
    gradient_accumulation_steps: int = 1
    memory_step: int | None = None

    def __post_init__(self) -> None:
        checked = {name: check_integer(getattr(self, name), name, 1) for name in ("steps", "eval_steps")}
        last, why = checked["steps"] - 1, f"there are {checked['steps']} steps"
        checked["warmup_steps"] = check_integer(self.warmup_steps, "warmup_steps", 0, last, why)
        checked["gradient_accumulation_steps"] = check_integer(
            self.gradient_accumulation_steps, "gradient_accumulation_steps", 1
        )
        for name, value in (checked | {"lr": check_positive(self.lr, "lr", "such as 1e-3")}).items():
            object.__setattr__(self, name, value)


class TrainState:
    """The model as it is run, its optimizer, and what the run has done so far; one step of it.

    Attributes:
        model: as it is run, which is wrapped where there are several processes; module: the model itself.
        peak_lrs: one for each group of the optimizer.
        diverged: of E runs that train at once, those whose loss was not finite. They are no longer updated.
        distributed: whether there are several processes; sharded: whether each has a share of the parameters (FSDP2).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        settings: TrainSettings,
        accelerator: "Accelerator | None" = None,
    ):
        self.model = self.module = model
        self.optimizer, self.loss, self.settings, self.accelerator = optimizer, loss, settings, accelerator
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.progress = Progress()
        self.diverged: set[int] = set()
        self.sharded = False
        if accelerator is not None:
            self.sharded = accelerator.distributed_type == "FSDP"
            if self.sharded and not accelerator.is_fsdp2:
                raise ValueError("FSDP of version 1 is not supported; accelerate launch --fsdp_version 2 chooses FSDP2")
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
            self.module = self.model if self.sharded else accelerator.unwrap_model(self.model)
        self.distributed = accelerator is not None and accelerator.num_processes > 1
        self.is_main_process = accelerator is None or accelerator.is_main_process
        self.device = next(self.module.parameters()).device
        self.optimizer.zero_grad()

    @property
    def steps_done(self) -> int:
        return self.progress.steps_done

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: param for name, param in self.module.named_parameters() if param.requires_grad}

    def timed_step(self, stop_requested: Callable[[], bool]) -> bool:
        """The next step: its loss and its time are noted. Returns whether any process was asked to stop."""
        start = time.perf_counter()
        with_memory = self.steps_done == self.settings.memory_step
        losses, stop = self.step_with_memory(stop_requested) if with_memory else self.step(stop_requested)
        self.progress.step_seconds.append(time.perf_counter() - start)
        self.progress.losses.append(losses)
        return stop

    def step(self, stop_requested: Callable[[], bool]) -> tuple[list[float], bool]:
        """The next step: (its E losses, whether any process was asked to stop). Errors: Diverged, nothing updated."""
        t, settings = self.steps_done, self.settings
        factor = lr_factor(t, settings.steps, settings.warmup_steps)
        for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lrs, strict=False):
            group["lr"] = peak_lr * factor
        losses, stop = self.all_reduce(self.forward_backward(t), stop_requested)
        self.drop_diverged(losses)
        self.clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses, stop

    def forward_backward(self, t: int) -> Tensor:
        """The E losses of this process in step t, shape (E,), summed over the parts; their gradients are added up."""
        parts = self.settings.gradient_accumulation_steps
        total = torch.zeros(())
        for part in range(parts):
            is_last = part == parts - 1
            waits = self.distributed and not self.sharded and not is_last  # gradients are exchanged in the last part
            with self.accelerator.no_sync(self.model) if self.accelerator is not None and waits else nullcontext():
                value = self.loss(self.model, t, part) if parts > 1 else self.loss(self.model, t)
                losses = self.as_vector(value)
                self.backward(losses.sum())
            total = losses.detach() if part == 0 else total + losses.detach()
        return total

    def as_vector(self, value: Tensor) -> Tensor:
        """A loss as shape (E,). Errors: ValueError for one that is neither a scalar nor one for each group."""
        self.progress.scalar_loss = value.ndim == 0
        if self.progress.scalar_loss:
            return value.reshape(1)
        groups = len(self.optimizer.param_groups)
        if value.shape != (groups,):
            raise ValueError(
                f"the loss has shape {tuple(value.shape)}; return a scalar, or one loss for each of {groups} group(s)"
            )
        if self.distributed or getattr(self.accelerator, "scaler", None) is not None:
            raise ValueError(
                "the loss is one for each group: such runs share one process, and no fp16 scale of the gradients; use "
                "one process and bf16 or fp32, or return a scalar"
            )
        return value

    def backward(self, value: Tensor) -> None:
        """Add the gradients of `value`. Accelerate averages what should be added up: hence the factor."""
        if self.accelerator is None:
            value.backward()
            return
        factor = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps  # it divides by both
        self.accelerator.backward(value if factor == 1 else value * factor)

    def all_reduce(self, losses: Tensor, stop_requested: Callable[[], bool]) -> tuple[list[float], bool]:
        """(the losses, summed over the processes; whether any of these was asked to stop)."""
        if self.accelerator is None or not self.distributed:
            return losses.tolist(), stop_requested()
        stop = losses.new_tensor([float(stop_requested())], dtype=torch.float64)
        *summed, stops = self.accelerator.reduce(torch.cat([losses.double(), stop]), "sum").tolist()
        return summed, stops > 0

    def drop_diverged(self, losses: list[float]) -> None:
        """Drop the gradients of the runs that have diverged. Errors: Diverged when none is left."""
        self.diverged |= {e for e, loss in enumerate(losses) if not math.isfinite(loss)}
        if len(self.diverged) == len(losses):
            subject = f"the loss is {losses[0]}" if len(losses) == 1 else f"all {len(losses)} runs have diverged"
            lrs = ", ".join(f"{lr:g}" for lr in dict.fromkeys(self.peak_lrs))
            norm = self.settings.max_grad_norm
            message = f"{subject} at step {self.steps_done}; lower lr ({lrs}) or max_grad_norm ({norm})"
            self.progress.losses.append(losses)
            raise Diverged(message, self.progress.returned_losses())
        for e in self.diverged:
            for param in self.optimizer.param_groups[e]["params"]:
                param.grad = None

    def clip_gradients(self) -> None:
        """Clip the gradient's norm: of the whole model's, or of each of several runs'."""
        if self.settings.max_grad_norm is None:
            return
        clip = nn.utils.clip_grad_norm_ if self.accelerator is None else self.accelerator.clip_grad_norm_
        groups = [group["params"] for group in self.optimizer.param_groups]
        for params in [list(self.model.parameters())] if self.progress.scalar_loss else groups:
            clip(params, self.settings.max_grad_norm)

    def step_with_memory(self, stop_requested: Callable[[], bool]) -> tuple[list[float], bool]:
        """A step whose memory is measured: what is held all the time, and the peak."""
        result = []
        peak = peak_bytes(lambda: result.append(self.step(stop_requested)), self.device)
        moments = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        weights = _nbytes([*self.module.parameters(), *self.module.buffers()])
        optimizer = _nbytes(moments)
        self.progress.memory = {
            "peak": weights + optimizer + peak,
            "weights": weights,
            "gradients": _nbytes(list(self.trained_parameters().values())),
            "optimizer": optimizer,
        }
        return result[0]

    def evaluate(self, evaluate: Callable[[nn.Module], object] | None) -> None:
        """Record what `evaluate` returns after the steps done, unless that is there; no random number is used up."""
        if evaluate is None or self.progress.is_evaluated():
            return
        generators = generator_state(self.device)
        self.module.eval()
        with torch.no_grad():
            self.progress.evaluations.append((self.steps_done, evaluate(self.module)))
        self.module.train()
        set_generator_state(generators)


class Generators(TypedDict):
    """The states of torch's global generators: the CPU's, and that of the run's GPU."""

    cpu: Tensor
    cuda: Tensor | None


def generator_state(device: torch.device) -> Generators:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_generator_state(state: Generators) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _nbytes(tensors: list[Tensor]) -> int:
    """Bytes of distinct storages; of a sharded tensor, this process's share."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())
