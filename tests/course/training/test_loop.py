"""training/loop.py: what a run of `train` computes, and what it refuses."""

import os
import signal
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_ref.course.training import train
from tests.course.training.small_models import assert_same, partial_loss, regression, whole_run, without_dropout


def test_train_is_adamw_with_warm_up_linear_decay_and_clipping():
    (model, loss), (twin, _) = regression(), regression()
    steps, rate, warmup = 9, 0.02, 3
    torch.manual_seed(5)
    history = train(
        model, loss, steps, rate, warmup_steps=warmup, weight_decay=0.1, betas=(0.8, 0.95), max_grad_norm=0.3
    )
    torch.manual_seed(5)
    optimizer, losses = torch.optim.AdamW(twin.parameters(), lr=1.0, weight_decay=0.1, betas=(0.8, 0.95)), []
    for t, share in enumerate([1 / 3, 2 / 3, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]):
        optimizer.param_groups[0]["lr"] = rate * share
        optimizer.zero_grad()
        value = loss(twin, t)
        value.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
        optimizer.step()
        losses.append(value.item())
    assert history.losses == losses and history.resumed_at == 0
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_groups_have_learning_rates_of_their_own():
    model, loss = regression()
    model[1].p = 0.0
    before = [p.clone() for p in model.parameters()]
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.0, "weight_decay": 0.0},
        {"params": list(model[3].parameters())},
    ]
    train(model, loss, 3, 0.05, param_groups=groups)
    assert [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)] == [True, True, False, False]


def test_evaluating_changes_nothing_and_sees_eval_mode_without_gradients():
    seen = []

    def evaluate(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return torch.rand(()).item()  # draws from the global generator

    torch.manual_seed(1)
    (model, loss), (twin, _) = regression(), regression()
    unwatched = train(model, loss, 5, 0.05)
    torch.manual_seed(1)
    watched = train(twin, loss, 5, 0.05, evaluate=evaluate, eval_steps=2)
    assert unwatched.losses == watched.losses and [step for step, _ in watched.evaluations] == [0, 2, 4, 5]
    assert seen == [(False, False)] * 4 and twin.training


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_that_add_up_give_the_whole_steps_gradients_and_losses(accumulate):
    expected, history = whole_run()
    model, calls = without_dropout(), []

    def parts(model, t, part):
        calls.append((t, part))
        return partial_loss(model, t, [0, 1, 2, 3][part::accumulate])

    found = train(model, parts, 7, 0.05, warmup_steps=2, gradient_accumulation_steps=accumulate)
    assert calls == [(t, part) for t in range(7) for part in range(accumulate)]
    assert found.losses == pytest.approx(history.losses, rel=1e-5)
    assert_same(model, expected)


def test_an_accelerator_of_one_process_changes_nothing():
    from accelerate import Accelerator

    expected, history = whole_run()
    model = without_dropout()
    found = train(
        model,
        lambda model, t: partial_loss(model, t, [0, 1, 2, 3]),
        7,
        0.05,
        warmup_steps=2,
        accelerator=Accelerator(cpu=True),
    )
    assert found.losses == history.losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("stops", [False, True])
def test_the_bar_leaves_nothing_behind_and_calls_the_processs_memory_so(tmp_path, capsys, stops):
    model, loss = regression()

    def slow(model, t):
        time.sleep(0.02)  # or the bar is not drawn again
        if stops and t == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(model, t)

    with pytest.raises(KeyboardInterrupt) if stops else nullcontext():
        train(model, slow, 12, 0.05, checkpoint_path=tmp_path / "run.pt", tokens_per_step=5, progress=True)
    shown = capsys.readouterr().err.split("\r")
    assert any(f"{n}/12" in line and "process=" in line and "GB" in line for line in shown for n in (10, 11, 12))
    assert not any("memory=" in line for line in shown) and shown[-1].strip() == "", shown[-1]


def test_bad_runs_are_refused(refused):
    model, loss = regression()
    refused(lambda: train(model, loss, 0, 0.1), "steps = 0")
    refused(lambda: train(model, loss, 3, 0.1, warmup_steps=3), "warmup_steps = 3")
    refused(lambda: train(model, loss, 3, float("inf")), "lr = inf")
    refused(lambda: train(model, loss, 3, 0.1, eval_steps=0), "eval_steps = 0")
    refused(lambda: train(model, loss, 3, -0.1), "lr = -0.1", "above 0")
    refused(lambda: train(model, loss, 3, 0.1, gradient_accumulation_steps=0), "gradient_accumulation_steps = 0")
    refused(lambda: train(model.requires_grad_(False), loss, 3, 0.1), "trains nothing", "requires_grad_(True)")
