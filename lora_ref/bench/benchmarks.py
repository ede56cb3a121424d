"""The benchmarks by name (`BENCHMARKS`): their cases, what measures a case, and how the rows are summed up."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import compiled, decompositions, layer, layer_memory, model


class Benchmark(NamedTuple):
    """A benchmark.

    Attributes:
        measure: measure(case, rounds, device) yields the rows (dicts) of one case; its docstring is the table's
            caption. A row's key says its unit (s, ms). The keys `size` (the picture's abscissa) and `seconds` (all
            times by contender) are not shown in the table.
        summarize: summarize(rows) is a sentence for people, of at least one row.
        work: work(case, rounds), about how many multiply-adds the case takes.
        cases: all of them, which --full runs.
        default_cases: how many of them a run that is neither --quick nor --full may take; None: all. --quick runs the
            first one.
        xlabel: what `size` is, for the picture.
        draw: draw(axes, rows) draws the picture's panel; None: time against size.
        setup_seconds: a first guess of the time that a case takes whatever its size.
        has_rounds: whether `rounds` changes anything.
        on_request: runs only when it is named.
    """

    measure: Callable[[Any, int, torch.device], Iterator[dict]]
    summarize: Callable[[list[dict]], str]
    work: Callable[[Any, int], float]
    cases: list
    default_cases: int | None = None
    xlabel: str = ""
    draw: Callable | None = None
    setup_seconds: float = 1.0
    has_rounds: bool = True
    on_request: bool = False


class Job(NamedTuple):
    """One case of one benchmark; `position` is its place in the benchmark's table."""

    name: str
    benchmark: Benchmark
    position: int
    case: Any

    @property
    def group(self) -> str:
        """Cases of one group differ in size only."""
        return getattr(self.case, "group", "")

    @property
    def dtype(self) -> torch.dtype:
        """Of the case's products."""
        return getattr(self.case, "dtype", torch.float32)

    def __str__(self) -> str:
        if hasattr(self.case, "_asdict"):
            return ", ".join(f"{name} {value}" for name, value in self.case._asdict().items()).replace("torch.", "")
        return "×".join(map(str, self.case)) if isinstance(self.case, tuple) else str(self.case)


BENCHMARKS = {
    "layer": Benchmark(
        layer.measure_layer,
        layer.summarize_layer,
        layer.work,
        layer.LAYERS,
        default_cases=len(layer.DEFAULT_LAYERS),
        draw=layer.draw_layer,
        setup_seconds=3,
    ),
    "layer_memory": Benchmark(
        layer_memory.measure_memory,
        layer_memory.summarize_memory,
        layer_memory.work,
        layer.LAYERS,
        default_cases=len(layer.DEFAULT_LAYERS),
        draw=layer_memory.draw_memory,
        setup_seconds=3,
        has_rounds=False,
    ),
    "model": Benchmark(
        model.measure_model,
        model.summarize_model,
        model.work,
        model.LLAMAS,
        xlabel="parameters",
        setup_seconds=5,
    ),
    "compile": Benchmark(
        compiled.measure_compiled,
        compiled.summarize_compiled,
        compiled.work,
        model.LLAMAS,
        default_cases=2,
        xlabel="parameters",
        setup_seconds=90,
        on_request=True,
    ),
    "svd": Benchmark(
        decompositions.measure_svd,
        decompositions.summarize_svd,
        decompositions.svd_work,
        decompositions.SHAPES,
        xlabel="entries of the matrix, d·k",
    ),
    "projections": Benchmark(
        decompositions.measure_projections,
        decompositions.summarize_projections,
        decompositions.projections_work,
        decompositions.SUBSPACES,
        xlabel="parameters, D",
    ),
}


def choose(benchmarks: dict[str, Benchmark], size: str) -> list[Job]:
    """The cases of a run of size "quick", "default" or "full"."""
    jobs = []
    for name, benchmark in benchmarks.items():
        end = {"quick": 1, "default": benchmark.default_cases, "full": None}[size]
        jobs += [Job(name, benchmark, position, case) for position, case in enumerate(benchmark.cases[:end])]
    return jobs
