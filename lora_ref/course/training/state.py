"""The state of one run: the model as it is run, its optimizer, the history; one step of it, and its checkpoint."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..._files import atomic_write
from ...measure import peak_bytes


@dataclass
class History:
    """What `train` did.

    losses: of every step, in nats; where several runs train at once, a list of theirs. evaluations: (steps done, what
    `evaluate` returned). seconds: of all, evaluations included; step_seconds: of each step. memory: bytes in the step
    `probe`, {"peak", "weights", "gradients", "optimizer"}, of this process; the peak's rest is activations and scratch
    tensors.
    """

    losses: list[float] | list[list[float]]
    evaluations: list[tuple[int, object]]
    seconds: float = 0.0
    resumed_at: int = 0
    step_seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] | None = None

    def member(self, e: int) -> "History":
        """Run e of several that trained at once: its losses and evaluations; times and bytes are those of all."""
        own = [losses[e] for losses in self.losses]
        return replace(self, losses=own, evaluations=[(step, found[e]) for step, found in self.evaluations])


class Diverged(FloatingPointError):
    """The loss is not finite; of several runs trained at once, every one's. `losses` are the history's, this step's
    included."""

    def __init__(self, said: str, losses: list):
        super().__init__(said)
        self.losses = losses


def fault(losses: Iterable[tuple[int, float]], what: str = "the loss") -> str | None:
    """The first of some (step, loss) whose loss is not finite, in words; None where there is none."""
    return next((f"{what} is {loss} at step {t}" for t, loss in losses if not math.isfinite(loss)), None)


class Run:
    """What `train` holds: the model as it is run, its optimizer, the history, and how many steps are done."""

    def __init__(self, model, loss, optimizer, settings, clip, evaluate, checkpoint, accelerator, accumulate):
        self.model = self.inner = model
        self.optimizer, self.loss, self.settings, self.clip = optimizer, loss, settings, clip
        self.evaluate, self.checkpoint, self.accumulate = evaluate, checkpoint, accumulate
        self.accelerator, self.sharded = accelerator, False
        self.history, self.done, self.saved = History([], []), 0, None
        self.ended: set[int] = set()  # of several runs trained at once, those that diverged
        self.start = time.perf_counter()
        if accelerator is not None:
            self.sharded = accelerator.distributed_type == "FSDP"
            if self.sharded and not accelerator.is_fsdp2:
                raise ValueError("FSDP of version 1 is not supported; accelerate launch --fsdp_version 2 chooses FSDP2")
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
            self.inner = self.model if self.sharded else accelerator.unwrap_model(self.model)
        self.several = accelerator is not None and accelerator.num_processes > 1
        self.first = accelerator is None or accelerator.is_main_process
        self.device = next(self.inner.parameters()).device
        self.optimizer.zero_grad()

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.inner.named_parameters() if p.requires_grad}

    def seconds(self) -> float:
        """Of the whole run, earlier sittings included."""
        return self.history.seconds + time.perf_counter() - self.start

    def step(self, t: int, told: list) -> tuple[float | list[float], bool]:
        """One step: (the loss, whether any process was told to stop). `told` holds something once this one was."""
        total = 0.0
        for part in range(self.accumulate):
            wait = self.several and not self.sharded and part < self.accumulate - 1
            with self.accelerator.no_sync(self.model) if wait else nullcontext():
                value = self.loss(self.model, t, part) if self.accumulate > 1 else self.loss(self.model, t)
                self.backward(self.summed(value) if value.ndim else value)
            total = total + value.detach()
        total, stopped = self.agreed(total, told)
        self.end(total, t)
        groups = [group["params"] for group in self.optimizer.param_groups]
        for e in self.ended:
            for p in groups[e]:
                p.grad = None
        if self.clip is not None:
            clip = nn.utils.clip_grad_norm_ if self.accelerator is None else self.accelerator.clip_grad_norm_
            for parameters in groups if isinstance(total, list) else [list(self.model.parameters())]:
                clip(parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, stopped

    def summed(self, values: Tensor) -> Tensor:
        """The sum of the losses of several runs, one for each group of the optimizer: its gradient is each run's own.

        Errors: ValueError for another number of losses, several processes, or a scale of 16 bits that all would share.
        """
        groups = len(self.optimizer.param_groups)
        if values.shape != (groups,):
            raise ValueError(
                f"the loss has shape {tuple(values.shape)}; return a scalar, or one loss for each of {groups} group(s)"
            )
        if self.several or getattr(self.accelerator, "scaler", None) is not None:
            raise ValueError(
                "the loss is one for each group: such runs share one process, and no fp16 scale of the gradients; use "
                "one process and bf16 or fp32, or return a scalar"
            )
        return values.sum()

    def end(self, total: float | list[float], t: int) -> None:
        """Note which runs have diverged: they rest, the others go on. Errors: Diverged when none is left."""
        values = _listed(total)
        self.ended |= {e for e, value in enumerate(values) if not math.isfinite(value)}
        if len(self.ended) == len(values):
            said = f"all {len(values)} runs have diverged" if isinstance(total, list) else f"the loss is {total}"
            raise Diverged(
                f"{said} at step {t}; lower the rate ({self.settings['rate']:g}) or clip more "
                f"(clip = {self.clip}){self.kept()}",
                [*self.history.losses, total],
            )

    def backward(self, value: Tensor) -> None:
        """Gradients of this part. Processes' gradients are averaged where they should be added: hence the factor."""
        if self.accelerator is None:
            return value.backward()
        factor = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps  # it divides by both
        self.accelerator.backward(value if factor == 1 else value * factor)

    def agreed(self, total: Tensor, told: list) -> tuple[float | list[float], bool]:
        """The loss summed over processes; whether any was told to stop."""
        if not self.several:
            return total.tolist(), bool(told)
        both = torch.stack([total.double(), total.new_tensor(float(bool(told)), dtype=torch.float64)])
        value, stops = self.accelerator.reduce(both, "sum").tolist()
        return value, stops > 0

    def measured(self, t: int, told: list) -> tuple[float | list[float], bool]:
        """A step whose memory is measured: what is held all the time, and the peak."""
        result = []
        peak = peak_bytes(lambda: result.append(self.step(t, told)), self.device)
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        weights, held = _nbytes([*self.inner.parameters(), *self.inner.buffers()]), _nbytes(state)
        self.history.memory = {
            "peak": weights + held + peak,
            "weights": weights,
            "gradients": _nbytes(list(self.trained().values())),
            "optimizer": held,
        }
        return result[0]

    def record(self, t: int) -> None:
        """Evaluate after t steps, if that was not done, and save."""
        found = self.history.evaluations
        if self.evaluate is not None and (not found or found[-1][0] != t):
            state = _generators(self.device)
            self.inner.eval()
            with torch.no_grad():
                found.append((t, self.evaluate(self.inner)))
            self.inner.train()
            _set_generators(state)
        self.save(t)

    def save(self, t: int) -> None:
        """Write the checkpoint, if there is to be one: all processes take part, the first one writes."""
        if self.checkpoint is None:
            return
        generators = [_generators(self.device)]
        if self.several:
            from accelerate.utils import gather_object

            generators = gather_object(generators)
        trained, state = self.state()
        content = {"settings": self.settings, "step": t, "model": trained, "optimizer": state}
        content |= {"generators": generators, "seconds": self.seconds()}
        content |= {k: getattr(self.history, k) for k in ("losses", "evaluations", "step_seconds", "memory")}
        scaler = getattr(self.accelerator, "scaler", None)
        content["scaler"] = None if scaler is None else scaler.state_dict()
        if self.first:
            with atomic_write(self.checkpoint) as file:
                torch.save(content, file)
        self.saved = t

    def state(self) -> tuple[dict, dict]:
        """(what is trained, by name; the optimizer's state), whole in the first process at least."""
        if not self.sharded:
            return {n: p.detach() for n, p in self.trained().items()}, self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        trained = get_model_state_dict(self.model, options=_whole())
        if self.done == 0:  # an empty state would be filled by a step on no gradients, and count as one
            return trained, {}
        return trained, get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=_whole())

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one. Errors: ValueError for another run's; nothing changed."""
        if self.checkpoint is not None and Path(self.checkpoint).exists():
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            differ = [key for key in self.settings if saved["settings"].get(key) != self.settings[key]]
            if differ:
                raise ValueError(
                    f"{self.checkpoint} is of another run: {', '.join(differ)} differ; remove it, or name another file"
                )
            self.restore(saved["model"], saved["optimizer"])
            if saved["scaler"] is not None and self.accelerator is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            rank = 0 if self.accelerator is None else self.accelerator.process_index
            _set_generators(saved["generators"][min(rank, len(saved["generators"]) - 1)])
            self.done = self.saved = self.history.resumed_at = saved["step"]
            for key in ("losses", "evaluations", "step_seconds", "memory", "seconds"):
                setattr(self.history, key, saved[key])
            for losses in self.history.losses:
                self.ended |= {e for e, loss in enumerate(_listed(losses)) if not math.isfinite(loss)}
        if self.several:
            self.accelerator.wait_for_everyone()

    def restore(self, trained: dict, state: dict) -> None:
        """The opposite of `state`."""
        if self.sharded:
            from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

            set_model_state_dict(self.model, trained, options=_whole(strict=False))
            if state:
                set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=_whole(strict=False))
            return
        with torch.no_grad():
            for name, p in self.trained().items():
                p.copy_(trained[name])
        self.optimizer.load_state_dict(state)

    def kept(self) -> str:
        """Where the run is, for messages."""
        if self.checkpoint is None or self.saved is None:
            return ""
        return f"; {self.checkpoint} holds the run as it was after step {self.saved}"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Errors of the system, said so that one knows what to do."""
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                raise MemoryError(
                    f"out of memory at step {self.done}: take fewer or shorter examples at a time, accumulate more "
                    f"parts, or checkpoint activations{self.kept()} ({reason(error)})"
                ) from None
            if self.several and process_lost(error):
                raise RuntimeError(
                    f"another process of this run has died at step {self.done} of {self.settings['steps']}"
                    f"{self.kept()}; the same command goes on from there ({reason(error)})"
                ) from None
            raise


def _listed(losses: float | list[float]) -> list[float]:
    return losses if isinstance(losses, list) else [losses]


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason(error)


def process_lost(error: Exception) -> bool:
    """Whether the error is what a process sees when another one is gone."""
    words = ("Connection", "connection", "gloo", "NCCL", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in reason(error) for word in words)


def reason(error: Exception) -> str:
    """The error's first line, cut short."""
    return str(error).strip().split("\n")[0][:200]


def _nbytes(tensors: list[Tensor]) -> int:
    """Bytes of distinct storages; of a sharded tensor, this process's share."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def _generators(device: torch.device) -> dict[str, Tensor | None]:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_generators(state: dict[str, Tensor | None]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _whole(**more):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, **more)
