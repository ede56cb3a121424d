"""What a training run has done: its losses and evaluations, and how they say that it diverged."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast


@dataclass
class History:
    """What `train` did: a loss for every step, an evaluation every so many steps, times and bytes.

    Attributes:
        losses: the loss of every step, in the loss function's unit (nats for a cross-entropy). Where the loss function
            returns one loss for each of E runs, a list of E for every step.
        evaluations: (steps done, what `evaluate` returned), from step 0 to the last.
        seconds: of the whole run, evaluations and earlier parts of a resumed run included.
        resumed_at: the step from which the run was resumed, 0 for a run that was not.
        step_seconds: of every step.
        memory: bytes in the step `memory_step`, in this process: {"peak", "weights", "gradients", "optimizer"}. What
            the peak has above the three others is activations and scratch tensors. None if no step was measured.

    Example:
        >>> history = History(losses=[0.9, 0.4], evaluations=[(0, 1.0), (2, 0.5)])
        >>> min(history.evaluations, key=lambda evaluation: evaluation[1])
        (2, 0.5)
        >>> together = History(losses=[[0.9, 2.0], [0.4, 1.5]], evaluations=[])
        >>> together.member(1).losses
        [2.0, 1.5]
    """

    losses: list[float] | list[list[float]]
    evaluations: list[tuple[int, Any]]
    seconds: float = 0.0
    resumed_at: int = 0
    step_seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] | None = None

    def member(self, e: int) -> "History":
        """Run e of several that trained at once: its losses and evaluations; times and bytes are those of all."""
        own = [losses[e] for losses in cast(list[list[float]], self.losses)]
        return replace(self, losses=own, evaluations=[(step, result[e]) for step, result in self.evaluations])


class Progress:
    """What a run has done so far, while it runs; `history` gives it to the caller.

    A loss function returns a scalar, or one loss for each of E runs that train at once. Here the losses of a step are a
    list of E in every case; E = 1 for an ordinary run.

    Attributes:
        losses: of every step, each a list of E; scalar_loss: whether the loss function returns scalars.
        seconds_before: what the earlier parts of a resumed run took.
        evaluations, step_seconds, memory, resumed_at: as History has them.
    """

    def __init__(self) -> None:
        self.losses: list[list[float]] = []
        self.scalar_loss = True
        self.evaluations: list[tuple[int, Any]] = []
        self.step_seconds: list[float] = []
        self.memory: dict[str, int] | None = None
        self.resumed_at = 0
        self.seconds_before = 0.0
        self._start = time.perf_counter()

    @property
    def steps_done(self) -> int:
        return len(self.losses)

    def seconds(self) -> float:
        """Of the whole run, the parts before it was resumed included."""
        return self.seconds_before + time.perf_counter() - self._start

    def diverged(self) -> set[int]:
        """Those of the E runs that had a loss which is not finite."""
        return {e for losses in self.losses for e, loss in enumerate(losses) if not math.isfinite(loss)}

    def is_evaluated(self) -> bool:
        """Whether the model as it is after the steps done was evaluated."""
        return bool(self.evaluations) and self.evaluations[-1][0] == self.steps_done

    def returned_losses(self) -> list[float] | list[list[float]]:
        """The losses as the loss function returned them: numbers, or lists of E."""
        return [losses[0] for losses in self.losses] if self.scalar_loss else self.losses

    def history(self) -> History:
        return History(
            losses=self.returned_losses(),
            evaluations=self.evaluations,
            seconds=self.seconds(),
            resumed_at=self.resumed_at,
            step_seconds=self.step_seconds,
            memory=self.memory,
        )


class Diverged(FloatingPointError):
    """The loss is not finite; of several runs trained at once, the loss of every one.

    Args:
        message: the step, and what to lower.
        losses: as `History.losses`, the last step's included.
    """

    def __init__(self, message: str, losses: list[float] | list[list[float]]):
        super().__init__(message)
        self.losses = losses


def fault(losses: Iterable[tuple[int, float]], what: str = "the loss") -> str | None:
    """The first loss that is not finite, in words.

    Args:
        losses: (step, loss) in the order of the steps.
        what: what the numbers are, as the subject of the sentence.

    Returns:
        "<what> is <loss> at step <step>"; None where every loss is finite.

    Example:
        >>> fault([(0, 0.7), (4, float("inf")), (8, float("nan"))], "the validation loss")
        'the validation loss is inf at step 4'
    """
    return next((f"{what} is {loss} at step {step}" for step, loss in losses if not math.isfinite(loss)), None)
