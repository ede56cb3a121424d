"""training: many adapters on one base, trained at once, end as each does when it is trained alone."""

import math
import os
import signal

import pytest
import torch
from torch import nn

from lora_ref import LoRAConfig, add_lora, lora_parameters
from lora_ref.batched import adapter_parameters, add_batched_lora, for_each_adapter, single_adapter
from lora_ref.course.training import train
from lora_ref.course.training.history import Diverged, Progress, fault
from lora_ref.course.training.loop import _shown

F64 = torch.float64
RANKS, ALPHAS, SEEDS = (2, 3, 1), (5.0, 4.0, 2.5), (0, 7, 7)
LRS = (0.01, 0.05, 0.002)
STEPS = 9


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(seed=3):
    """6 → 8 → 4: no layer has d = k; the first one has no bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4)).double()


def config(e, **changes):
    return LoRAConfig(**{"r": RANKS[e], "lora_alpha": ALPHAS[e], "target_modules": "all-linear"} | changes)


def generator(e):
    return torch.Generator().manual_seed(SEEDS[e])


def filled(model, e):
    """The same model with a B that is not zero, drawn for adapter e."""
    with torch.no_grad():
        for i, (name, p) in enumerate(lora_parameters(model).items()):
            if name.endswith("lora_B"):
                p.copy_(randn(*p.shape, seed=100 * e + i))
    return model


def together(configs=None, base=None, numbers=True):
    model = add_batched_lora(
        base or network(), configs or [config(e) for e in range(3)], [generator(e) for e in range(3)]
    )
    if numbers:
        for e in range(3):
            with single_adapter(model, e):
                filled(model, e)
    return model


def alone(e, own=None, base=None, numbers=True):
    model = add_lora(base or network(), own or config(e), generator=generator(e))
    return filled(model, e) if numbers else model


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def losses_of(model, t, e):
    """The loss of rows that depend on the step and the adapter."""
    x = randn(4, 6, seed=1000 * t + e).to(next(model.parameters()).dtype)
    return x, x[:, :4].sin() * (e + 1)


def side_by_side(model, t):
    x, target = (torch.cat(parts) for parts in zip(*(losses_of(model, t, e) for e in range(3)), strict=True))
    return (model(x) - target).square().view(3, -1).mean(1)


def single(e):
    def loss(model, t):
        x, target = losses_of(model, t, e)
        return (model(x) - target).square().mean()

    return loss


OPTIONS = {"warmup_steps": 2, "weight_decay": 0.3, "max_grad_norm": 0.5, "eval_steps": 4}


def trained_together(model=None, loss=side_by_side, lrs=LRS, **options):
    model = model or together()
    groups = [{"params": adapter_parameters(model, e), "lr": lrs[e]} for e in range(3)]
    return model, train(model, loss, STEPS, 1.0, param_groups=groups, **OPTIONS | options)


def trained_alone(e, model=None, **options):
    model = model or alone(e)
    return model, train(model, single(e), STEPS, LRS[e], **OPTIONS | options)


def check(model, history, members=(0, 1, 2), tolerance=1e-10, dtype=F64):
    """These adapters, and their losses, are those of separate runs."""
    for e in members:
        expected, own = trained_alone(e, alone(e, base=network().to(dtype)))
        assert history.member(e).losses == pytest.approx(own.losses, rel=tolerance)
        for a, b in zip(adapter_parameters(model, e), lora_parameters(expected).values(), strict=True):
            close(a, b, tolerance)


def test_trained_together_they_end_as_each_does_alone():
    model, history = trained_together()
    assert [len(step) for step in history.losses] == [3] * STEPS
    check(model, history)
    norms = []  # or the test would see neither clipping, nor whose norm it is
    for e in range(3):
        twin = alone(e)
        single(e)(twin, 0).backward()
        norms.append(torch.stack([p.grad.norm() for p in twin.parameters() if p.requires_grad]).norm().item())
    assert min(norms) > 1.5 * OPTIONS["max_grad_norm"] and max(norms) > 1.5 * min(norms)


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-10), (torch.float32, 1e-4)])
def test_so_they_do_where_a_step_is_done_in_parts(dtype, tolerance):
    def loss(model, t, part):
        mine = [[v[part::2] for v in losses_of(model, t, e)] for e in range(3)]
        x, target = (torch.cat(parts) for parts in zip(*mine, strict=True))
        return (model(x) - target).square().view(3, -1).mean(1) / 2

    model, history = trained_together(together(base=network().to(dtype)), loss, gradient_accumulation_steps=2)
    check(model, history, tolerance=tolerance, dtype=dtype)


def test_an_evaluation_of_each_adapter_is_in_each_ones_curve():
    X = randn(5, 6, seed=77)
    model, history = trained_together(evaluate=lambda model: for_each_adapter(model, lambda m: m(X).sum().item()))
    for e in range(3):
        _, own = trained_alone(e, evaluate=lambda model: model(X).sum().item())
        found = history.member(e).evaluations
        assert [t for t, _ in found] == [t for t, _ in own.evaluations] == [0, 4, 8, 9]
        assert [v for _, v in found] == pytest.approx([v for _, v in own.evaluations], rel=1e-9)


@pytest.mark.parametrize("how", ["lr", "nan", "gradient"])
def test_one_that_diverges_does_not_disturb_the_others(how):
    def loss(model, t):
        values = side_by_side(model, t)
        if how == "nan" and t >= 3:
            return values * torch.tensor([1.0, float("nan"), 1.0])
        if how == "gradient":  # the loss is finite, its gradient is not
            return torch.stack([values[0], values[1] + (values[1] * 0).sqrt(), values[2]])
        return values

    lrs = (LRS[0], 1e200, LRS[2]) if how == "lr" else LRS
    model, history = trained_together(loss=loss, lrs=lrs)
    lost = [losses[1] for losses in history.losses]
    assert not all(torch.isfinite(torch.tensor(lost)))
    check(model, history, (0, 2))
    if how == "nan":  # it is no longer updated: one more step would have made it NaN
        assert lost[:3] == pytest.approx(trained_alone(1)[1].losses[:3])
        assert all(torch.isfinite(p).all() for p in adapter_parameters(model, 1))


def test_when_none_is_left_the_run_stops_and_the_error_has_the_losses_of_each(tmp_path):
    def loss(model, t):
        return side_by_side(model, t) * torch.tensor([float("inf") if t >= at else 1.0 for at in (2, 5, 3)])

    with pytest.raises(Diverged, match="all 3 runs have diverged at step 5; lower lr \\(0.01, 0.05, 0.002\\)") as error:
        trained_together(loss=loss, checkpoint_path=tmp_path / "run.pt")
    assert isinstance(error.value, FloatingPointError) and "after step 4" in str(error.value)
    curves = list(zip(*error.value.losses, strict=True))
    assert [fault(enumerate(c)) for c in curves] == [f"the loss is inf at step {t}" for t in (2, 5, 3)]
    assert fault(enumerate(curves[0][:2])) is None


def test_interrupted_they_resume_bit_for_bit_and_one_that_diverged_is_still_not_updated(tmp_path):
    def loss(model, t):
        return side_by_side(model, t) * torch.tensor([1.0, 1.0, float("nan") if t == 2 else 1.0])

    def interrupted(model, t):
        if t == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(model, t)

    configs = [config(e, lora_dropout=0.2) for e in range(3)]
    torch.manual_seed(5)
    whole, expected = trained_together(together(configs), loss)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of 9"):
        trained_together(together(configs), interrupted, checkpoint_path=tmp_path / "run.pt", eval_steps=100)
    torch.manual_seed(99)
    model, history = trained_together(together(configs), loss, checkpoint_path=tmp_path / "run.pt", eval_steps=100)
    assert history.resumed_at == 5 and str(history.losses) == str(expected.losses)
    for e in range(3):
        assert all(
            torch.equal(a, b) for a, b in zip(adapter_parameters(model, e), adapter_parameters(whole, e), strict=True)
        )


def test_a_checkpoint_of_the_same_adapters_at_other_learning_rates_is_refused(tmp_path, refused):
    file = tmp_path / "run.pt"
    trained_together(checkpoint_path=file)
    refused(lambda: trained_together(checkpoint_path=file, lrs=LRS[::-1]), "of another run: lrs differ")


def test_the_bar_shows_the_best_loss_of_those_that_have_one():
    progress = Progress()
    progress.losses, progress.scalar_loss = [[0.9, math.nan, 0.7]], False
    assert _shown(progress, 0, torch.device("cpu"))["loss"] == "0.700 at best"
    progress.losses, progress.scalar_loss = [[0.9]], True
    assert _shown(progress, 0, torch.device("cpu"))["loss"] == "0.900"


class Pretended:
    """An accelerator with some other attributes."""

    def __init__(self, **others):
        from accelerate import Accelerator

        self.accelerator, self.others = Accelerator(cpu=True), others

    def __getattr__(self, name):
        return self.others[name] if name in self.others else getattr(self.accelerator, name)


def test_losses_that_are_not_one_for_each_group_in_one_process_are_refused(refused):
    refused(lambda: trained_together(loss=lambda model, t: side_by_side(model, t)[:2]), "shape (2,)", "3 group(s)")
    refused(lambda: train(alone(0), lambda model, t: model(randn(4, 6)).sum(1), 3, 0.1), "shape (4,)", "1 group(s)")
    for others in ({"num_processes": 2}, {"scaler": object()}):
        refused(lambda others=others: trained_together(accelerator=Pretended(**others)), "one process and bf16 or fp32")
    model, history = trained_together(accelerator=Pretended())
    check(model, history)
