"""lora_ref.measure: the pairing on a clock that the test moves; counts and bytes against arithmetic."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lora_ref import LoRAConfig, LoRALinear, measure


class FakeMachine:
    """A clock that only the contenders move, on a machine whose speed the test sets."""

    def __init__(self):
        self.time, self.slowness, self.calls = 0.0, 1.0, []

    def clock(self) -> float:
        return self.time

    def contender(self, name: str, work: float, drift: float = 1.0):
        def run():
            self.calls.append(name)
            self.time += work * self.slowness
            self.slowness *= drift

        return run


@pytest.fixture
def machine():
    return FakeMachine()


# ---------------------------------------------------------------- pairing


def test_paired_interleaves_the_contenders_and_rotates_their_order(machine):
    functions = {name: machine.contender(name, 1.0) for name in "abc"}
    measure.paired(functions, rounds=4, warmup=0, clock=machine.clock)
    assert "".join(machine.calls) == "abc" + "bca" + "cab" + "abc"


def test_paired_warms_up_without_timing(machine):
    functions = {name: machine.contender(name, 1.0) for name in "ab"}
    result = measure.paired(functions, rounds=3, warmup=2, clock=machine.clock)
    assert len(machine.calls) == 2 * (2 + 3)
    assert [len(timing.seconds) for timing in result.values()] == [3, 3]


def test_paired_times_and_ratios_belong_to_their_round(machine):
    functions = {"a": machine.contender("a", 2.0), "b": machine.contender("b", 3.0)}

    result = measure.paired(functions, rounds=2, warmup=0, clock=machine.clock)
    assert result["a"].seconds == [2.0, 2.0] and result["b"].seconds == [3.0, 3.0]
    assert result["a"].ratios == [1.0, 1.0] and result["b"].ratios == [1.5, 1.5]
    assert result["b"].ms == 3000.0


def test_a_machine_that_slows_down_between_rounds_leaves_paired_ratios_alone(machine):
    """Two contenders, in rounds at speeds 1, 1/4, 1/16: the times spread 16-fold, the ratios not at all."""
    calls = {"a": machine.contender("a", 1.0), "b": machine.contender("b", 3.0)}

    def in_turn(name):
        def run():
            calls[name]()
            if len(machine.calls) % 2 == 0:  # a round is over
                machine.slowness *= 4

        return run

    result = measure.paired({name: in_turn(name) for name in calls}, rounds=3, warmup=0, clock=machine.clock)
    assert result["b"].seconds == [3.0, 12.0, 48.0]
    assert result["b"].ratios == [3.0, 3.0, 3.0]


def test_rotation_cancels_a_drift_within_rounds(machine):
    """Equal work on a machine that slows by 10 % a call: whoever goes second looks slower, in turn."""
    functions = {name: machine.contender(name, 1.0, drift=1.1) for name in "ab"}
    ratios = measure.paired(functions, rounds=4, warmup=0, clock=machine.clock)["b"].ratios
    assert ratios == pytest.approx([1.1, 1 / 1.1, 1.1, 1 / 1.1])


@pytest.mark.parametrize(
    "functions, options, words",
    [
        ({}, {"rounds": 1}, "functions is empty"),
        ({"a": lambda: None}, {"rounds": 0}, "rounds = 0"),
        ({"a": lambda: None}, {"rounds": 1, "warmup": -1}, "warmup = -1"),
        ({"a": lambda: None}, {"rounds": 1, "clock": lambda: 7.0}, "'a' took no time"),
    ],
)
def test_paired_refuses(functions, options, words):
    with pytest.raises(ValueError, match=words):
        measure.paired(functions, **options)


def test_quartiles():
    assert measure.quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}
    assert measure.quartiles([7.0]) == {"q1": 7.0, "median": 7.0, "q3": 7.0}
    with pytest.raises(ValueError, match="empty"):
        measure.quartiles([])


# ---------------------------------------------------------------- counts and bytes


@pytest.mark.parametrize("N, d, k, r", [(12, 10, 6, 2), (512, 10, 6, 2)])  # factored, materialised
def test_multiply_adds_are_those_of_the_derivation(N, d, k, r):
    x = torch.zeros(N, k, requires_grad=True)
    full = measure.multiply_adds(lambda: nn.Linear(k, d)(x).sum().backward())
    assert full == 3 * N * d * k
    layer = LoRALinear(nn.Linear(k, d), LoRAConfig(r=r, lora_alpha=5))
    beyond = 3 * N * r * (d + k) if N == 12 else 2 * N * r * (d + k) + 2 * d * k * r
    assert measure.multiply_adds(lambda: layer(x).sum().backward()) == 2 * N * d * k + beyond
    assert measure.multiply_adds(lambda: layer(x)) < measure.multiply_adds(lambda: layer(x).sum().backward())


def test_peak_bytes_sees_what_is_freed_before_the_end():
    def build():
        a = torch.empty(1000, dtype=torch.float64)  # 8,000 bytes
        b = a + 1  # 16,000
        del a
        return b.float()  # 12,000 at the end

    assert 16_000 <= measure.peak_bytes(build) < 16_100  # and the number 1
    assert measure.peak_bytes(lambda: None) == 0


def test_peak_bytes_writes_nothing():
    code = "import torch; from lora_ref.measure import peak_bytes; peak_bytes(lambda: torch.ones(9))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout + run.stderr == ""


def test_saved_bytes_counts_each_storage_once_and_not_the_known():
    x, W = torch.zeros(7, 5, requires_grad=True), torch.zeros(3, 5, requires_grad=True)
    assert measure.saved_bytes(lambda: x @ W.T, [x, W]) == 0
    assert measure.saved_bytes(lambda: x @ W.T, [W]) == 7 * 5 * 4
    assert (
        measure.saved_bytes(lambda: (x @ W.T).sum() + (x[:, :1] * x).sum(), [W]) == 7 * 5 * 4
    )  # twice x, and a view of it
    assert measure.saved_bytes(lambda: (x @ W.T).tanh(), [x, W]) == 7 * 3 * 4  # tanh keeps its result
