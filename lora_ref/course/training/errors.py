"""Errors of the system in a training run, translated into what to do; and interrupts, which let a step end first."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .checkpoint import Checkpoint
from .history import Diverged
from .state import TrainState


def out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory did not suffice, on a GPU or on the CPU.

    Args:
        error: what torch raised.

    Returns:
        True also for a RuntimeError of the CPU's allocator, which has no type of its own.

    Example:
        >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
        True
    """
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason(error)


def process_lost(error: Exception) -> bool:
    """Whether the error is what a process sees when another process of the run is gone.

    Args:
        error: what torch.distributed raised.

    Returns:
        True for its own error type, and where the first line names the connection or its library.

    Example:
        >>> process_lost(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
        True
    """
    words = ("Connection", "connection", "gloo", "NCCL", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in reason(error) for word in words)


def reason(error: Exception) -> str:
    """The error's first line, cut after 200 characters.

    Args:
        error: any exception; torch's messages go on for a screen.

    Returns:
        One line.

    Example:
        >>> reason(RuntimeError("out of memory\\nException raised from allocate at ..."))
        'out of memory'
    """
    return str(error).strip().split("\n")[0][:200]


@contextmanager
def translate_errors(state: TrainState, checkpoint: Checkpoint) -> Iterator[None]:
    """Errors inside the `with` say what to do and where the run is saved.

    Memory that does not suffice becomes a MemoryError, a process that is gone a RuntimeError; a Diverged says in
    addition where the checkpoint is. Any other error stays what it is.
    """
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{error}{checkpoint.hint()}", error.losses) from None
    except RuntimeError as error:
        if out_of_memory(error):
            raise MemoryError(
                f"out of memory at step {state.steps_done}: take fewer or shorter examples at a time, raise "
                f"gradient_accumulation_steps, or checkpoint activations{checkpoint.hint()} ({reason(error)})"
            ) from None
        if state.distributed and process_lost(error):
            raise RuntimeError(
                f"another process of this run has died at step {state.steps_done} of {state.settings.steps}"
                f"{checkpoint.hint()}; the same command resumes from there ({reason(error)})"
            ) from None
        raise


@contextmanager
def defer_interrupts(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Inside the `with` the first SIGINT or SIGTERM only sets a flag; the function that is given returns it.

    A second one acts as before. Where not `enabled`, and outside the main thread, all act as before.
    """
    received: list[int] = []
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in handlers:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        restore()
