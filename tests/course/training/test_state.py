"""training/state.py: one step, its memory, and what happens when the loss is not finite."""

import pytest
import torch

from lora_ref.course.training import Diverged, state, train
from tests.course.training.small_models import regression


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    model, loss = regression()
    explodes = lambda model, t: loss(model, t) * (float("nan") if t == 3 else 1)  # noqa: E731
    with pytest.raises(FloatingPointError, match="nan at step 3; lower lr \\(0.05\\) or max_grad_norm \\(1.0\\)"):
        train(model, explodes, 6, 0.05, eval_steps=2, checkpoint_path=tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_measured_step_gives_the_bytes_and_changes_no_bit(tmp_path):
    torch.manual_seed(1)
    model, loss = regression(frozen=True)
    history = train(model, loss, 4, 0.05, memory_step=2)
    torch.manual_seed(1)
    twin, loss = regression(frozen=True)
    assert train(twin, loss, 4, 0.05).losses == history.losses
    memory = history.memory
    assert memory["weights"] == 4 * (6 * 8 + 8 + 8 * 3 + 3) and memory["gradients"] == 4 * (8 * 3 + 3)
    rows = 4 * 16 * (6 + 8)  # the input in, and the tanh out, at the least
    assert memory["peak"] > memory["weights"] + memory["optimizer"] + memory["gradients"] + rows
    assert len(history.step_seconds) == 4 and 0 < sum(history.step_seconds) < history.seconds


def test_the_peak_counts_what_is_held_before_the_measured_step(monkeypatch):
    monkeypatch.setattr(state, "peak_bytes", lambda function, device: (function(), 10**6)[1])
    model, loss = regression(frozen=True)
    memory = train(model, loss, 3, 0.05, memory_step=1).memory
    assert memory["peak"] == memory["weights"] + memory["optimizer"] + 10**6


def test_a_loss_of_shape_1_is_one_run_and_stays_a_list():
    torch.manual_seed(1)
    (model, loss), (twin, _) = regression(), regression()
    scalar = train(model, loss, 4, 0.05)
    torch.manual_seed(1)
    vector = train(twin, lambda model, t: loss(model, t).view(1), 4, 0.05)
    assert vector.losses == [[value] for value in scalar.losses] and vector.member(0).losses == scalar.losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_the_steps_before_a_divergence_lost_is_in_the_error():
    model, loss = regression()
    torch.manual_seed(1)
    with pytest.raises(Diverged, match="the loss is inf at step 2") as raised:
        train(model, lambda model, t: loss(model, t) * (float("inf") if t == 2 else 1), 6, 0.05)
    twin, _ = regression()
    torch.manual_seed(1)
    assert raised.value.losses == [*train(twin, loss, 6, 0.05).losses[:2], float("inf")]
