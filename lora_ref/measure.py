"""What a piece of code takes: seconds, in fair turns; multiply-adds; peak memory; what it saves for the backward."""

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
    """One contender: its seconds in each round, and their ratios to the reference's in that round."""

    seconds: list[float]
    ratios: list[float]

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)


def quartiles(values: list[float]) -> dict[str, float]:
    """{q1, median, q3} of at least one number, by linear interpolation. Errors: ValueError when empty."""
    if not values:
        raise ValueError("values is empty and has no quartiles; pass at least one number")
    cuts = statistics.quantiles(values * 2 if len(values) == 1 else values, method="inclusive")
    return dict(zip(("q1", "median", "q3"), cuts))


def paired(
    functions: dict[str, Callable], rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time the contenders in turns; the first one is the reference of every ratio.

        round i calls them in the order i, i + 1, … (mod n);   ratio_i = t_i(name) / t_i(first)

    `functions` maps names to functions of no arguments; `warmup` untimed rounds go first. Where CUDA
    is in use, each reading of the clock waits for the device. Results are dropped at once.
    Errors: ValueError for no contender, rounds < 1, warmup < 0, or a reference too fast for the clock.
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
        raise ValueError(f"{names[0]!r} took no time that the clock can see; let one call do more work")
    return {name: Timing(own, [t / t0 for t, t0 in zip(own, reference)]) for name, own in seconds.items()}


def multiply_adds(function: Callable[[], object]) -> int:
    """The multiply-adds of the matrix products and convolutions in function(), backward included: half its FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    def in_place(Y, H, M, **_) -> int:  # Y += H·M, shapes: the one product that torch's counter leaves out
        return 2 * H[0] * H[1] * M[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        function()
    return counter.get_total_flops() // 2


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most memory, in bytes, that torch held at any moment of function() above what it held before.

    Counts what torch's allocators hand out, on the CPU as the profiler records it; a matrix library's own
    scratch space is not seen. The result of the call counts until it returns.
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
    """Bytes that autograd keeps for the backward of function(): distinct storages, the `known` tensors' excepted."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # held while the hooks count, so that no address is used twice
    del result
    return sum(kept.values())
