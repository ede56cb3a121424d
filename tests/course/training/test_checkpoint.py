"""training/checkpoint.py: a run that was stopped resumes, and ends bit for bit as if it had not been stopped."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_ref import LoRAConfig, add_lora
from lora_ref.batched import adapter_parameters, add_batched_lora, for_each_adapter
from lora_ref.course.training import History, train
from tests.course.training.small_models import regression

BEFORE = Path(__file__).parents[2] / "data" / "before_the_rooms"  # what version 0.1 wrote


@pytest.mark.parametrize("killed_at", [1, 4, 5, 9])
def test_a_killed_run_resumes_and_ends_bit_for_bit_as_if_it_had_not_been(tmp_path, killed_at):
    class Killed(Exception):
        pass

    def run(model, loss, **options):
        return train(
            model,
            loss,
            10,
            0.05,
            warmup_steps=2,
            eval_steps=2,
            evaluate=lambda m: m(torch.ones(1, 6)).sum().item(),
            **options,
        )

    torch.manual_seed(3)
    whole, loss = regression(frozen=True)
    expected = run(whole, loss)
    torch.manual_seed(3)
    model, loss = regression(frozen=True)

    def dies(model, t):
        if t == killed_at:
            raise Killed
        return loss(model, t)

    with pytest.raises(Killed):
        run(model, dies, checkpoint_path=tmp_path / "run.pt")
    torch.manual_seed(99)  # another process: another generator, another start of what is trained
    again, loss = regression(frozen=True)
    with torch.no_grad():
        again[3].weight.normal_()
    history = run(again, loss, checkpoint_path=tmp_path / "run.pt")
    assert history.resumed_at == killed_at // 2 * 2
    assert history.losses == expected.losses and history.evaluations == expected.evaluations
    for mine, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    done = run(regression(frozen=True)[0], dies, checkpoint_path=tmp_path / "run.pt")
    assert done.resumed_at == 10 and done.losses == expected.losses


def test_an_interrupted_run_is_saved_says_how_to_resume_and_ends_bit_for_bit_the_same(tmp_path):
    def run(model, loss):
        return train(
            model,
            loss,
            9,
            0.05,
            eval_steps=4,
            evaluate=lambda m: m(torch.ones(1, 6)).sum().item(),
            checkpoint_path=tmp_path / f"{id(model)}.pt" if model is whole else tmp_path / "run.pt",
        )

    torch.manual_seed(3)
    whole, loss = regression()
    expected = run(whole, loss)
    torch.manual_seed(3)
    model, loss = regression()

    def interrupted(model, t):
        if t == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(model, t)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 6 of 9; .*run.pt holds the run.* resumes"):
        run(model, interrupted)
    assert signal.getsignal(signal.SIGINT) is handler
    torch.manual_seed(77)
    again, loss = regression()
    found = run(again, loss)
    assert found.resumed_at == 6 and found.losses == expected.losses and found.evaluations == expected.evaluations
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_the_checkpoint_holds_what_is_trained_only_and_belongs_to_its_run(tmp_path, refused):
    model, loss = regression(frozen=True)
    train(model, loss, 4, 0.05, checkpoint_path=tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert list(saved["model"]) == ["3.weight", "3.bias"] and len(saved["optimizer"]["state"]) == 2
    before = [p.clone() for p in model.parameters()]
    refused(lambda: train(model, loss, 5, 0.05, checkpoint_path=tmp_path / "run.pt"), "another run", "steps")
    refused(lambda: train(model.requires_grad_(True), loss, 4, 0.05, checkpoint_path=tmp_path / "run.pt"), "trained")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_optimizer_holds_what_is_trained_and_nothing_of_what_is_frozen(tmp_path):
    model, loss = regression(frozen=True)
    train(model, loss, 2, 0.05, checkpoint_path=tmp_path / "run.pt", memory_step=1)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert [len(group["params"]) for group in saved["optimizer"]["param_groups"]] == [2]
    assert all(p.grad is None for p in model.parameters())
    numbers = 8 * 3 + 3
    assert saved["memory"]["optimizer"] == 2 * 4 * numbers + 2 * 4  # two moments a number, a count a tensor


# Checkpoints of version 0.1, which had other names for the settings and losses that are numbers or lists


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_adapter(**options):
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))
    config = LoRAConfig(r=3, lora_alpha=5, target_modules=["0", "2"])
    model = add_lora(base, config, generator=torch.Generator().manual_seed(1))
    X, Y = draw(9, 12, seed=5), draw(9, 6, seed=6)

    def loss(model, t):
        return (model(X) - Y).square().mean()

    options = {"steps": 12, "lr": 1e-2, "warmup_steps": 2} | options
    return model, train(model, loss, evaluate=lambda m: float(loss(m, 0)), eval_steps=4, **options)


def three_adapters(lrs=(1e-2, 5e-2, 2e-3), **options):
    """One of the three diverges in step 2."""
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    configs = [LoRAConfig(r=r, lora_alpha=5, target_modules=["0", "2"]) for r in (2, 3, 1)]
    model = add_batched_lora(base, configs, [torch.Generator().manual_seed(e) for e in range(3)])
    groups = [{"params": adapter_parameters(model, e), "lr": lrs[e]} for e in range(3)]
    X, Y = draw(15, 6, seed=5), draw(15, 4, seed=6)

    def loss(model, t):
        values = (model(X) - Y).square().view(3, -1).mean(1)
        return values * torch.tensor([1.0, 1.0, float("nan") if t == 2 else 1.0])

    def evaluate(model):
        return for_each_adapter(model, lambda one: float((one(X) - Y).square().mean()))

    options = {"steps": 12, "lr": 7.0, "warmup_steps": 2} | options
    return model, train(model, loss, param_groups=groups, evaluate=evaluate, eval_steps=4, **options)


def numbers(history):
    """All losses and evaluations, in one list."""
    values = [torch.tensor(history.losses), torch.tensor([value for _, value in history.evaluations])]
    return torch.cat([value.flatten() for value in values]).tolist()


@pytest.mark.parametrize(
    "run, name, recorded",
    [
        (one_adapter, "checkpoint.pt", "uninterrupted.json"),
        (three_adapters, "checkpoint_of_three.pt", "uninterrupted_three.json"),
    ],
)
def test_a_checkpoint_of_before_is_resumed_and_ends_as_the_uninterrupted_run(run, name, recorded, tmp_path):
    shutil.copy(BEFORE / name, tmp_path / "run.pt")
    before = History(**json.loads((BEFORE / recorded).read_text()))
    resumed_model, resumed = run(checkpoint_path=tmp_path / "run.pt")
    model, whole = run()
    assert resumed.resumed_at == 8 and [step for step, _ in resumed.evaluations] == [0, 4, 8, 12]
    assert str(resumed.losses[:8]) == str(before.losses[:8])  # read from the file; as text, since NaN is not NaN
    if str(numbers(whole)) == str(numbers(before)):  # a processor that rounds as the one that wrote the file
        assert str(numbers(resumed)) == str(numbers(before))
        assert all(torch.equal(a, b) for a, b in zip(resumed_model.parameters(), model.parameters(), strict=True))
    assert numbers(resumed) == pytest.approx(numbers(before), rel=1e-5, nan_ok=True)
    again = torch.load(tmp_path / "run.pt", weights_only=True)  # written again, in the form of now
    assert again["scalar_loss"] is (run is one_adapter) and again["step"] == 12
    assert run(checkpoint_path=tmp_path / "run.pt")[1].resumed_at == 12


def test_a_checkpoint_of_before_belongs_to_its_run_too(tmp_path, refused):
    for run, name in ((one_adapter, "checkpoint.pt"), (three_adapters, "checkpoint_of_three.pt")):
        file = tmp_path / name
        shutil.copy(BEFORE / name, file)
        content = file.read_bytes()
        refused(lambda run=run, file=file: run(steps=13, checkpoint_path=file), "another run: steps differ")
        refused(
            lambda run=run, file=file: run(warmup_steps=3, checkpoint_path=file), "another run: warmup_steps differ"
        )
        assert file.read_bytes() == content
    refused(lambda: one_adapter(lr=2e-2, checkpoint_path=tmp_path / "checkpoint.pt"), "another run: lr differ")
    swapped = {"lrs": (5e-2, 1e-2, 2e-3), "checkpoint_path": tmp_path / "checkpoint_of_three.pt"}
    refused(lambda: three_adapters(**swapped), "another run: lrs differ")


def test_a_run_with_groups_is_another_one_than_a_run_without(tmp_path, refused):
    model, loss = regression(frozen=True)
    params = [param for param in model.parameters() if param.requires_grad]
    train(model, loss, 4, 0.05, checkpoint_path=tmp_path / "run.pt")
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    refused(
        lambda: train(model, loss, 4, 0.05, param_groups=groups, checkpoint_path=tmp_path / "run.pt"), "another run"
    )
    train(model, loss, 4, 0.05, param_groups=groups, checkpoint_path=tmp_path / "groups.pt")
    before = [param.clone() for param in model.parameters()]
    refused(lambda: train(model, loss, 4, 0.05, checkpoint_path=tmp_path / "groups.pt"), "another run")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
