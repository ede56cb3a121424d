"""One training run of one model: `train`.

With an `accelerate.Accelerator` the same loop runs on whatever that was made for: a GPU, 16-bit arithmetic, several
processes (DDP, FSDP2). Without one it runs in this process, where the model is.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import Checkpoint
from .errors import defer_interrupts, translate_errors
from .history import History, Progress
from .state import TrainSettings, TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    accelerator: "Accelerator | None" = None,
    gradient_accumulation_steps: int = 1,
    memory_step: int | None = None,
) -> History:
    """Train the parameters of a model that require a gradient, by AdamW, with warm-up and linear decay.

        η_t = lr · (t + 1) / warmup_steps                      t = 0 … warmup_steps − 1
        η_t = lr · (steps − t) / (steps − warmup_steps)        t = warmup_steps … steps − 1

    Step t computes loss(model, t) and its gradient, scales that down where its norm exceeds `max_grad_norm`, and takes
    one step of AdamW at the learning rate η_t.

    Stopping and resuming: with a `checkpoint_path` an interrupt (SIGINT, SIGTERM) lets the step end, writes the file
    and raises KeyboardInterrupt. The same call then resumes from the file, and on a CPU ends bit for bit as if it had
    never stopped. The file has what is trained, the optimizer's state, torch's generators and the history so far;
    nothing of what is frozen. It is written beside its place and renamed, so that a crash leaves the file of before.

    Several runs at once: a loss function that returns E losses, shape (E,), one for each of E `param_groups` and
    depending on that group alone, trains E independent runs: the gradient of the losses' sum is each run's own. Each
    group's gradient is clipped by itself, and the history has E losses for every step (`History.member` takes one run
    out). A run whose loss is not finite is no longer updated; the others continue.

    Several processes: the parts that the processes compute (with `gradient_accumulation_steps`, all parts of all
    processes) must ADD UP to the step's loss. For a mean over tokens each part is its own tokens' sum, divided by the
    number of tokens in the whole step. Every process evaluates; the main one alone writes the file and shows the bar.

    Args:
        model: trained in place; parameters with requires_grad=False stay as they are.
        loss: loss(model, t) → the loss of step t, a scalar tensor or one of shape (E,). With
            `gradient_accumulation_steps` > 1, loss(model, t, part). What it draws at random must depend on its
            arguments and torch's global generator alone, or a resumed run is another one.
        steps: the number of optimizer steps, at least 1.
        lr: the peak learning rate, positive; for the groups that have no "lr" of their own.
        param_groups: as torch.optim's, {"params": […], "lr": peak, "weight_decay": …}; without them, all parameters
            that require a gradient are one group.
        warmup_steps: steps of the warm-up, fewer than `steps`.
        weight_decay: AdamW's, decoupled from the gradient.
        betas: AdamW's decay rates of the two moments.
        max_grad_norm: largest norm of the gradient over all parameters; None clips nothing.
        evaluate: evaluate(model) → anything, called before the first step, after every `eval_steps` and after the last,
            in eval mode and without gradients; the random numbers it draws do not change the run.
        eval_steps: steps between evaluations, and between checkpoints.
        checkpoint_path: the file to write and to resume from; written at the start, at every evaluation, at the end.
        tokens_per_step: for the progress bar's tokens per second; 0 leaves them out.
        progress: show a progress bar on stderr, which is removed at the end.
        accelerator: an accelerate.Accelerator, which says where and in what precision the model runs, and in how many
            processes.
        gradient_accumulation_steps: parts of a step, computed one after the other; all add up to one update.
        memory_step: the step whose memory is measured, if any.

    Returns:
        What was done: losses, evaluations, times.

    Raises:
        ValueError: nothing requires a gradient; a number out of range; a checkpoint of another run; a loss of another
            shape; one loss for each group in several processes or with fp16's loss scale; FSDP of version 1.
        FloatingPointError: as `Diverged`, the loss is not finite, or that of the last of E runs; names the step.
        MemoryError: memory does not suffice.
        RuntimeError: another process has died.
        KeyboardInterrupt: the run was interrupted. These messages say where the run is saved, if it is.

    Example:
        >>> X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> def loss(model, t):
        ...     return (model(X) - X.sum(1, keepdim=True)).square().mean()
        >>> history = train(nn.Linear(3, 1), loss, steps=80, lr=0.1, warmup_steps=5, checkpoint_path="run.pt")
        >>> history.losses[-1] < 1e-3 < history.losses[0]
        True
        >>> again = train(nn.Linear(3, 1), loss, steps=80, lr=0.1, warmup_steps=5, checkpoint_path="run.pt")
        >>> again.resumed_at, again.losses == history.losses
        (80, True)

    Source:
        Loshchilov & Hutter 2019 (arXiv 1711.05101) for AdamW; the schedule is transformers'
        get_linear_schedule_with_warmup, whose first step has the factor 0 instead of 1/warmup_steps.
    """
    settings = TrainSettings(
        steps=steps,
        lr=lr,
        warmup_steps=warmup_steps,
        max_grad_norm=max_grad_norm,
        eval_steps=eval_steps,
        gradient_accumulation_steps=gradient_accumulation_steps,
        memory_step=memory_step,
    )
    optimizer = _adamw(model, param_groups, lr=lr, betas=betas, weight_decay=weight_decay)
    checkpoint = Checkpoint(
        checkpoint_path, _run_settings(model, settings, optimizer.param_groups if param_groups is not None else None)
    )
    state = TrainState(model, optimizer, loss, settings, accelerator)
    checkpoint.resume(state)
    model.train()
    bar = _bar(state, shown=progress)
    with translate_errors(state, checkpoint), defer_interrupts(checkpoint_path is not None) as stop_requested, bar:
        _run(state, checkpoint, evaluate, stop_requested, lambda: _advance(bar, state, tokens_per_step))
    return state.progress.history()


def _adamw(model: nn.Module, param_groups: list[dict] | None, **options) -> torch.optim.AdamW:
    """AdamW of these groups, or of one with everything that requires a gradient. Errors: ValueError for none of it."""
    trained = [param for param in model.parameters() if param.requires_grad]
    if not trained:
        raise ValueError(f"{type(model).__name__} trains nothing; set requires_grad_(True) on what is to be trained")
    groups = [{"params": trained}] if param_groups is None else [dict(group) for group in param_groups]
    return torch.optim.AdamW(groups, **options)


def _run_settings(model: nn.Module, settings: TrainSettings, param_groups: list[dict] | None) -> dict:
    """What makes a run the same one, for its checkpoint: the schedule, and names and shapes of what is trained."""
    trained = {name: list(param.shape) for name, param in model.named_parameters() if param.requires_grad}
    lrs = {"lr": settings.lr} if param_groups is None else {"lrs": [group["lr"] for group in param_groups]}
    return {"steps": settings.steps, "warmup_steps": settings.warmup_steps, "trained": trained} | lrs


def _run(
    state: TrainState,
    checkpoint: Checkpoint,
    evaluate: Callable[[nn.Module], object] | None,
    stop_requested: Callable[[], bool],
    after_step: Callable[[], None],
) -> None:
    """The steps that are left, with evaluations and checkpoints. Errors: KeyboardInterrupt when asked to stop."""
    settings = state.settings
    if state.steps_done == 0:
        state.evaluate(evaluate)
        checkpoint.save(state)
    while state.steps_done < settings.steps:
        stop = state.timed_step(stop_requested)
        after_step()
        evaluates = state.steps_done % settings.eval_steps == 0 or state.steps_done == settings.steps
        if evaluates:
            state.evaluate(evaluate)
        if evaluates or stop:
            checkpoint.save(state)
        if stop:
            raise KeyboardInterrupt(
                f"stopped after step {state.steps_done} of {settings.steps}; {checkpoint.path} holds the run, and the "
                "same command resumes from there"
            )


def _bar(state: TrainState, shown: bool) -> tqdm:
    """The progress bar, on stderr, in the main process alone."""
    hidden = not (shown and state.is_main_process)
    total, done = state.settings.steps, state.steps_done
    return tqdm(total=total, initial=done, unit="step", disable=hidden, file=sys.stderr, leave=False)


def _advance(bar: tqdm, state: TrainState, tokens_per_step: int) -> None:
    bar.update()
    if not bar.disable and state.steps_done % 10 == 0:
        bar.set_postfix(_shown(state.progress, tokens_per_step, state.device))


def _shown(progress: Progress, tokens_per_step: int, device: torch.device) -> dict[str, str]:
    """What the bar says beside the steps and the time left.

    On a CPU that is the memory of the whole process, torch and the libraries included: more than the run's own, which
    `memory_step` measures.
    """
    losses = [loss for loss in progress.losses[-1] if math.isfinite(loss)]
    shown = {"loss": f"{losses[0]:.3f}" if progress.scalar_loss else f"{min(losses):.3f} at best"}
    if tokens_per_step:
        recent = progress.step_seconds[-10:]
        shown["tokens/s"] = f"{tokens_per_step * len(recent) / sum(recent):,.0f}"
    if device.type == "cuda":
        shown["memory"] = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    elif sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        shown["process"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
    return shown
