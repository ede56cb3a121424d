"""What a piece of code costs: seconds, in fair turns; multiply-adds; peak memory; what it saves for the backward."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_integer

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of peak_bytes would write to stderr


class Timing(NamedTuple):
    """One contender's times.

    Attributes:
        seconds: its time in each round.
        ratios: its time divided by the reference's in the same round, for each round.

    Example:
        >>> Timing(seconds=[0.002, 0.004, 0.003], ratios=[1.0, 1.0, 1.0]).ms
        3.0
    """

    seconds: list[float]
    ratios: list[float]

    @property
    def ms(self) -> float:
        """The median time, in milliseconds."""
        return 1e3 * statistics.median(self.seconds)


def quartiles(values: list[float]) -> dict[str, float]:
    """The quartiles of some numbers, by linear interpolation.

    Args:
        values: at least one number.

    Returns:
        {"q1": …, "median": …, "q3": …}, in the numbers' unit.

    Raises:
        ValueError: values is empty.

    Example:
        >>> quartiles([5.0, 1.0, 4.0, 2.0, 3.0])
        {'q1': 2.0, 'median': 3.0, 'q3': 4.0}
    """
    if not values:
        raise ValueError("values is empty and has no quartiles; pass at least one number")
    if len(values) == 1:
        values = [*values, *values]  # statistics.quantiles needs two
    return dict(zip(("q1", "median", "q3"), statistics.quantiles(values, method="inclusive"), strict=True))


def paired(
    functions: dict[str, Callable], rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time the contenders in turns; the first one is the reference of every ratio.

        round i calls them in the order i, i + 1, … (mod n);   ratio_i = t_i(name) / t_i(first)

    A machine's speed drifts; contenders of one round see the same speed, and the rotation cancels a drift within
    rounds. Where CUDA is in use, each reading of the clock waits for the device. Results are dropped at once.

    Args:
        functions: names → functions of no arguments.
        rounds: timed rounds, at least 1.
        warmup: untimed rounds before them, at least 0.
        clock: returns the time in seconds.

    Returns:
        Names → times, in seconds, and ratios.

    Raises:
        TypeError: rounds or warmup is not an integer.
        ValueError: no contender, rounds < 1, warmup < 0, or a reference too fast for the clock.

    Example:
        >>> times = paired({"sum": lambda: sum(range(9999)), "max": lambda: max(range(9999))}, rounds=3)
        >>> times["sum"].ratios, len(times["max"].seconds)
        ([1.0, 1.0, 1.0], 3)
    """
    rounds, warmup = check_integer(rounds, "rounds", 1), check_integer(warmup, "warmup", 0)
    if not functions:
        raise ValueError("functions is empty; pass at least one contender, as {name: function}")

    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return clock()

    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = now()
            functions[name]()
            elapsed = now() - start
            if i >= 0:
                seconds[name].append(elapsed)
    reference = seconds[names[0]]
    if min(reference) <= 0:
        raise ValueError(f"{names[0]!r} took no time that the clock can measure; let one call do more work")
    return {name: Timing(own, [t / t0 for t, t0 in zip(own, reference, strict=True)]) for name, own in seconds.items()}


def multiply_adds(function: Callable[[], object]) -> int:
    """The multiply-adds of the matrix products and convolutions in function(), backward included: half its FLOPs.

    Args:
        function: what is counted, without arguments; it is called once.

    Returns:
        The number of multiply-adds.

    Example:
        >>> multiply_adds(lambda: torch.ones(2, 3) @ torch.ones(3, 5))  # 2·3·5
        30

    Source:
        torch.utils.flop_counter, and the product Y += H·M, which it leaves out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def in_place(Y, H, M, **_) -> int:  # shapes of Y += H·M, the one product that torch's counter leaves out
        return 2 * H[0] * H[1] * M[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        function()
    return counter.get_total_flops() // 2


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most memory that torch held at any moment of function() above what it held before.

    Counts what torch's allocators hand out, on the CPU as the profiler records it; a matrix library's own
    scratch space is not seen. The result of the call counts until it returns.

    Args:
        function: what is measured, without arguments; it is called once.
        device: the device whose memory counts, a CPU or a CUDA device.

    Returns:
        Bytes.

    Example:
        >>> peak_bytes(lambda: torch.empty(1000, dtype=torch.float64).double())
        8000
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # garbage of earlier calls, freed during this one, would count as memory that it gives back
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
    finally:
        if collecting:
            gc.enable()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def saved_bytes(function: Callable[[], Tensor], known: list[Tensor]) -> int:
    """The memory that autograd saves for the backward of function(): distinct storages, the `known` tensors' excepted.

    Args:
        function: a forward, without arguments; it is called once.
        known: tensors that exist anyway, such as the input and the weights.

    Returns:
        Bytes.

    Example:
        >>> x, W = torch.ones(7, 5, requires_grad=True), torch.ones(3, 5)
        >>> saved_bytes(lambda: x @ W.T, [x, W]), saved_bytes(lambda: (x @ W.T).tanh(), [x, W])  # 7·3 float32
        (0, 84)
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # held while the hooks count, so that no address is used twice
    del result
    return sum(saved.values())
