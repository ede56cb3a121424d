"""How many seconds a case will take, learnt from those that were measured on this machine.

    estimate(w) = t_j + c·(w − w_j)

seconds for a case of w multiply-adds. j is the case of its benchmark and group, of those measured so far, whose
multiply-adds w_j are nearest, t_j its seconds; c is the slope between the smallest and the largest of them: what a
multiply-add takes once the time that every case takes is subtracted.
"""

import math
from typing import NamedTuple

import torch

from .benchmarks import Job

MIN_ROUNDS = 3
SLOPE_FLOOR = 4  # times FIRST_RATE: no case is expected to run faster than this
FIRST_RATE = {"cpu": 1e10, "cuda": 5e12}  # multiply-adds per second, until a case of the run says more


class Point(NamedTuple):
    """Multiply-adds and seconds of a case that was measured."""

    work: float
    seconds: float


class Estimator:
    """How many seconds a case will take, learnt from those that were measured."""

    def __init__(self, device_type: str, threads: int = 1):
        self.first_rate = FIRST_RATE[device_type]
        if device_type == "cpu":
            self.first_rate *= threads
        self.measured: dict[tuple[str, str], list[Point]] = {}  # by benchmark and group
        self.setups: dict[tuple[str, str], float] = {}
        self.dtypes: dict[tuple[str, str], torch.dtype] = {}

    def add(self, job: Job, rounds: int, seconds: float) -> None:
        """A case that was measured."""
        key = (job.name, job.group)
        self.measured.setdefault(key, []).append(Point(job.benchmark.work(job.case, rounds), seconds))
        self.setups[key] = job.benchmark.setup_seconds
        self.dtypes[key] = job.dtype

    def seconds(self, job: Job, rounds: int) -> float:
        """The estimate at the head of this module; from the benchmark's other groups, or from other benchmarks, where
        the group has no case yet."""
        work, setup = job.benchmark.work(job.case, rounds), job.benchmark.setup_seconds
        points = self.measured.get((job.name, job.group))
        if points is None:
            points = [point for (name, _), group in self.measured.items() if name == job.name for point in group]
        if not points:
            return setup + work * min(self._slopes_of_others(job), default=1 / self.first_rate)
        near = min(points, key=lambda point: abs(math.log(work / point.work)))
        slope = self._slope(points, setup)
        if len(points) == 1:  # a small case, of which the time that every case takes is the most
            slope = min([slope, *self._slopes_of_others(job)])
        return max(near.seconds + slope * (work - near.work), min(point.seconds for point in points) / 2)

    def _slopes_of_others(self, job: Job) -> list[float]:
        """Seconds per multiply-add of other groups and benchmarks, in the same dtype."""
        return [
            self._slope(points, self.setups[key])
            for key, points in self.measured.items()
            if key != (job.name, job.group) and self.dtypes[key] == job.dtype
        ]

    def _slope(self, points: list[Point], setup: float) -> float:
        """Seconds per multiply-add. The clock's noise makes it neither 0 nor more than a case took altogether."""
        small, large = min(points), max(points)
        if small.work < large.work:
            slope = (large.seconds - small.seconds) / (large.work - small.work)
        else:
            slope = (large.seconds - setup) / large.work
        slope = max(slope, 1 / (SLOPE_FLOOR * self.first_rate))
        return min(slope, min(point.seconds / point.work for point in points))

    def affordable_rounds(self, job: Job, rounds: int, allowance: float) -> int:
        """The most rounds, from `rounds` down to MIN_ROUNDS, with which the case takes at most `allowance` seconds."""
        if not job.benchmark.has_rounds:
            return rounds
        while rounds > MIN_ROUNDS and self.seconds(job, rounds) > allowance:
            rounds -= 1
        return rounds
