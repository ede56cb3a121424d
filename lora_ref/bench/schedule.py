"""Which cases a run measures, in which order, and with how many rounds, so that it ends within its budget."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import torch

from .benchmarks import Job
from .estimator import Estimator

SHARE_OF_A_CASE = 1 / 12  # of the budget: a case that takes longer gets fewer rounds


class LeftOut(NamedTuple):
    """A case that was not measured, and why: "budget", "emulated" or "interrupted"."""

    job: Job
    reason: str


@dataclass
class Outcome:
    """What a run measured.

    Attributes:
        rows: benchmark → rows, in the order of its cases.
        left_out: what was not measured.
        interrupted: whether Ctrl-C ended it.
    """

    rows: dict[str, list[dict]]
    left_out: list[LeftOut] = field(default_factory=list)
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether all cases were measured but those that the hardware emulates."""
        return all(one.reason == "emulated" for one in self.left_out)


def without_emulated(jobs: list[Job], emulated: dict[torch.dtype, str]) -> tuple[list[Job], list[LeftOut]]:
    """(the cases in dtypes that the device multiplies itself, the others)."""
    native, left_out = [], []
    for job in jobs:
        if job.dtype in emulated:
            left_out.append(LeftOut(job, "emulated"))
        else:
            native.append(job)
    return native, left_out


def most_informative_first(jobs: list[Job], rounds: int) -> list[Job]:
    """The cases in waves. Each wave has one case of every benchmark and group, so that however early a run ends, all
    of them are represented; from wave to wave the sizes spread out. Within a wave a benchmark's cheap cases come
    first."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.name, job.group), []).append(job)

    def by_work(job: Job) -> float:
        return job.benchmark.work(job.case, rounds)

    spread = [_spread(sorted(group, key=by_work)) for group in groups.values()]
    names = list(dict.fromkeys(job.name for job in jobs))
    ordered = []
    for wave in zip_longest(*spread):
        present = [job for job in wave if job is not None]
        ordered += sorted(present, key=lambda job: (names.index(job.name), by_work(job)))
    return ordered


def _spread(ascending: list) -> list:
    """The cheapest first, then the middle one, then those in the middle of what is left, the cheaper part first. The
    dearest come last where this puts them."""
    if not ascending:
        return []
    order, parts = ascending[:1], [ascending[1:]]
    while parts:
        part = parts.pop(0)
        if part:
            middle = len(part) // 2
            order.append(part[middle])
            parts += [part[:middle], part[middle + 1 :]]
    return order


class Agenda:
    """The cases that wait, in their order, and which one is next."""

    def __init__(self, jobs: list[Job], rounds: int, budget: float | None, device: torch.device):
        self.waiting = list(jobs) if budget is None else most_informative_first(jobs, rounds)
        self.rounds = rounds
        self.budget = budget
        self.estimator = Estimator(device.type, torch.get_num_threads())

    def next(self, elapsed: float) -> tuple[Job, int] | None:
        """The first case that fits into what is left of the budget, and its rounds; None where none does. One that
        does not fit waits: the estimate may fall when more is measured."""
        for job in self.waiting:
            if self.budget is None:
                return job, self.rounds
            left = self.budget - elapsed
            rounds = self.estimator.affordable_rounds(job, self.rounds, min(left, self.budget * SHARE_OF_A_CASE))
            if self.estimator.seconds(job, rounds) <= left:
                return job, rounds
        return None

    def done(self, job: Job, rounds: int, seconds: float) -> None:
        """The case was measured."""
        self.waiting = [one for one in self.waiting if one is not job]
        self.estimator.add(job, rounds, seconds)


def run(
    jobs: list[Job],
    rounds: int,
    budget: float | None,
    device: torch.device,
    *,
    on_row: Callable[[Job, dict], None] = lambda job, row: None,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
) -> Outcome:
    """Measure the cases. With a budget, the most informative ones come first, expensive ones get fewer rounds, and
    those whose estimate exceeds the time that is left are left out; Ctrl-C ends the run and keeps the rows.

    `on_row` is called with each row as it is measured. `started` is the clock's reading from which the budget counts.
    """
    started = clock() if started is None else started
    agenda = Agenda(jobs, rounds, budget, device)
    found: list[tuple[Job, dict]] = []
    interrupted = False
    try:
        while (chosen := agenda.next(clock() - started)) is not None:
            job, own_rounds = chosen
            begin = clock()
            for row in job.benchmark.measure(job.case, own_rounds, device):
                if job.benchmark.has_rounds:
                    row["rounds"] = own_rounds
                found.append((job, row))
                on_row(job, row)
            agenda.done(job, own_rounds, clock() - begin)
    except KeyboardInterrupt:
        interrupted = True
    outcome = Outcome({job.name: [] for job in jobs}, interrupted=interrupted)
    outcome.left_out = [LeftOut(job, "interrupted" if interrupted else "budget") for job in agenda.waiting]
    for job, row in sorted(found, key=lambda pair: pair[0].position):
        outcome.rows[job.name].append(row)
    return outcome
