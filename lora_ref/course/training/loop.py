"""One run of one model: `train`, with what a long run needs: a schedule, checkpoints, resume, several processes.

With an `accelerate.Accelerator` the same loop runs on whatever that was made for: a GPU, 16-bit arithmetic, several
processes (DDP, FSDP). Without one it runs in this process, where the model is.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..._checks import check_integer
from .state import History, Run


def train(
    model: nn.Module,
    loss: Callable[..., Tensor],
    steps: int,
    lr: float,
    *,
    param_groups: list[dict] | None = None,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    max_grad_norm: float | None = 1.0,
    evaluate: Callable[[nn.Module], object] | None = None,
    eval_steps: int = 100,
    checkpoint_path: str | Path | None = None,
    tokens_per_step: int = 0,
    progress: bool = False,
    accelerator=None,
    gradient_accumulation_steps: int = 1,
    memory_step: int | None = None,
) -> History:
    """Train what requires a gradient in one model, by AdamW, with everything that a long run needs.

        rate_t = lr · min(1, (t+1)/warmup_steps) · (steps − t)/(steps − warmup_steps) after the warm-up

    `loss(model, t)` is the scalar loss of step t; what it draws must depend on t and torch's global generator
    alone. `param_groups` are AdamW's, {"params", "lr" (instead of `lr`), "weight_decay"}; without them one
    group of all. The gradient's global norm is clipped at `max_grad_norm`. Before the first step, after the last and
    eval_steps `eval_steps` steps `evaluate(model)` is recorded (in eval mode, without gradients), and `checkpoint_path`, a
    file, is written: beside, then renamed, so that a crash leaves the old one whole. If the file is there, the
    run goes on from it, and on a CPU ends bit for bit as if it had never stopped. It holds what is trained,
    not what is frozen. `tokens_per_step` a step and `progress` are for the bar.

    A loss of shape (E,), one for each of E `param_groups` that depends on that group alone, makes them E runs, trained at
    once: backward of the sum, each gradient's norm clipped by itself, a list of E losses a step in the history. A run
    whose loss is not finite rests from there on; the others do not notice.

    `gradient_accumulation_steps` > 1 calls loss(model, t, part) for each part = 0 … gradient_accumulation_steps − 1 and takes one step for all. With
    several processes (`accelerator`) each calls its own. The parts of all of them ADD UP to the step's loss: a mean
    over tokens_per_step has in each part the part's sum over the step's whole number of tokens_per_step. Evaluations run in eval_steps
    process; process 0 alone writes and shows the bar. `memory_step` is the step whose memory is measured.

    An interrupt (SIGINT, SIGTERM) with a `checkpoint_path` lets the step end, saves, and raises KeyboardInterrupt.

    Errors: ValueError for nothing to train, steps or eval_steps < 1, a lr that is not positive, a checkpoint_path of
    another run, a loss of another shape, one for each group in several processes or fp16. FloatingPointError
    (`Diverged`), naming the step, when the loss is not finite, or the last of E runs has diverged; MemoryError when
    memory does not suffice; RuntimeError when another process has died: what was saved stays, and the message says
    where.
    """
    steps, eval_steps = check_integer(steps, "steps", 1), check_integer(eval_steps, "eval_steps", 1)
    warmup_steps = check_integer(warmup_steps, "warmup_steps", 0, steps - 1, f"there are {steps} steps")
    gradient_accumulation_steps = check_integer(gradient_accumulation_steps, "gradient_accumulation_steps", 1)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr = {lr!r} is out of range; choose a positive number, such as 1e-3")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"{type(model).__name__} trains nothing; set requires_grad_(True) on what is to be trained")
    given = param_groups is not None
    param_groups = [dict(group) for group in param_groups] if given else [{"params": list(trained.values())}]
    peak_lrs = [group.get("lr", lr) for group in param_groups]
    optimizer = torch.optim.AdamW(param_groups, lr=lr, betas=betas, weight_decay=weight_decay)
    settings = {
        "steps": steps,
        "rate": lr,
        "warmup": warmup_steps,
        "trained": {n: list(p.shape) for n, p in trained.items()},
    } | ({"ratios": [peak / lr for peak in peak_lrs]} if given else {})
    run = Run(
        model,
        loss,
        optimizer,
        settings,
        max_grad_norm,
        evaluate,
        checkpoint_path,
        accelerator,
        gradient_accumulation_steps,
    )
    run.resume()
    history, at = run.history, run.done
    shown = progress and run.first
    bar = tqdm(total=steps, initial=at, unit="step", disable=not shown, file=sys.stderr, leave=False)
    with run.explained(), _interrupts(checkpoint_path is not None) as stopped, bar:
        model.train()
        if at == 0:
            run.record(0)
        for t in range(at, steps):
            factor = min(1.0, (t + 1) / warmup_steps) if t < warmup_steps else (steps - t) / (steps - warmup_steps)
            for group, peak in zip(run.optimizer.param_groups, peak_lrs):
                group["lr"] = peak * factor
            begin = time.perf_counter()
            value, stop = run.measured(t, stopped) if t == memory_step else run.step(t, stopped)
            history.step_seconds.append(time.perf_counter() - begin)
            history.losses.append(value)
            run.done = t + 1
            bar.update()
            if shown and t % 10 == 9:
                bar.set_postfix(_shown(history, tokens_per_step, run.device))
            if run.done % eval_steps == 0 or run.done == steps:
                run.record(run.done)
            elif stop:
                run.save(run.done)
            if stop:
                raise KeyboardInterrupt(
                    f"stopped after step {run.done} of {steps}; {checkpoint_path} holds the run, and the same command "
                    "goes on from there"
                )
    history.seconds = run.seconds()
    return history


@contextmanager
def _interrupts(armed: bool) -> Iterator[list[int]]:
    """A list that an interrupt fills instead of raising; a second interrupt raises. Main thread only."""
    seen: list[int] = []
    if not armed or threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame) -> None:
        seen.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _shown(history: History, tokens: int, device: torch.device) -> dict[str, str]:
    """What the bar says beside the steps and the time left. The process's memory is more than the run's own, which
    `probe` measures: torch and the libraries are in it."""
    last = history.losses[-1]
    shown = {"loss": f"{last:.3f}" if isinstance(last, float) else f"{min(filter(math.isfinite, last)):.3f} at best"}
    if tokens:
        recent = history.step_seconds[-10:]
        shown["tokens/s"] = f"{tokens * len(recent) / sum(recent):,.0f}"
    if device.type == "cuda":
        shown["memory"] = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    elif sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        shown["process"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
    return shown
