"""fit.py: many runs at once are what torch.optim makes of them one by one."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_ref.course.classifiers import DigitClassifier, LowRankUpdate, seeded
from lora_ref.course.fit import batch_indices, cross_entropy_many, fit, one_thread, train_many
from lora_ref.intrinsic_dimension import RandomSubspace

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# mini-batches


@pytest.mark.parametrize("n, batch, steps", [(10, 3, 11), (12, 4, 7), (5, 5, 3), (7, 1, 20), (9, 8, 2)])
def test_batches_walk_through_shuffles_without_repeating_an_example(n, batch, steps, rng_untouched):
    picks = batch_indices(n, batch, steps, [0, 1, 5])
    assert picks.shape == (steps, 3, batch) and picks.dtype == torch.int64
    assert picks.min() >= 0 and picks.max() < n
    per_epoch = n // batch
    for run in picks.unbind(1):
        for epoch in run.split(per_epoch):
            assert len(epoch.unique()) == epoch.numel()


def test_every_epoch_and_every_seed_shuffles_anew_and_all_examples_are_met():
    picks = batch_indices(10, 3, 60, [0, 1])
    epochs = picks[:, 0].reshape(20, 9)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 20
    assert epochs.unique().tolist() == list(range(10))  # the one that an epoch leaves out is another one each time
    assert not torch.equal(picks[:, 0], picks[:, 1])


def test_a_seeds_batches_depend_on_nothing_but_the_seed():
    alone, among, longer = batch_indices(10, 3, 7, [4]), batch_indices(10, 3, 7, [9, 4]), batch_indices(10, 3, 20, [4])
    assert torch.equal(alone[:, 0], among[:, 1]) and torch.equal(alone, longer[:7])


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"batch": 0}, ["batch = 0", "between 1 and 10"]),
        ({"batch": 11}, ["batch = 11", "between 1 and 10", "10 examples"]),
        ({"batch": 2.0}, ["2.0", "between 1 and 10"]),
        ({"batch": True}, ["True", "between 1 and 10"]),
        ({"steps": 0}, ["steps = 0", "at least 1"]),
        ({"steps": math.nan}, ["nan", "at least 1"]),
        ({"n": 0}, ["n = 0", "at least 1"]),
        ({"seeds": []}, ["[]", "at least one"]),
    ],
)
def test_impossible_batches_are_refused(arguments, says, refused):
    refused(lambda: batch_indices(**{"n": 10, "batch": 3, "steps": 5, "seeds": [0], **arguments}), *says)


# training

TARGET = randn(6, 3, seed=9)
X = randn(6, 5, seed=8)


def start(*runs):
    """Parameters of every shape: a matrix, a vector and a number for each run."""
    return {"A": randn(*runs, 5, 3, seed=1), "b": randn(*runs, 3, seed=2), "c": randn(*runs, seed=3)}


def loss(p, step):
    """(…,): a curved loss whose data changes with the step."""
    output = (X.roll(step, 0) @ p["A"] + p["b"][..., None, :]).tanh() * p["c"][..., None, None]
    return (output - TARGET).square().mean((-1, -2)) + 0.01 * p["A"].pow(4).sum((-1, -2))


def alone(p, rate, steps, optimizer, decay):
    """The same training of one run by torch.optim."""
    p = {name: value.clone().requires_grad_() for name, value in p.items()}
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer](p.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps if decay else 1.0)
    curve = []
    for t in range(steps):
        value = loss(p, t)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        curve.append(value.item())
    return p, curve


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_training_together_equals_torch_optim_one_by_one(optimizer, decay, shape):
    rates = torch.tensor([1e-3, 0.01, 0.1, 0.3], dtype=F64).view(shape)
    first, steps = start(*shape), 30
    together, curve = train_many(loss, first, rates, steps, optimizer, decay)
    assert curve.shape == (steps, *shape)
    for run in np.ndindex(*shape):
        apart, losses = alone({n: v[run] for n, v in first.items()}, rates[run].item(), steps, optimizer, decay)
        for name in first:
            torch.testing.assert_close(together[name][run], apart[name].detach(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(curve[:, *run].numpy(), losses, rtol=1e-6)


def test_by_default_it_is_adam_with_decay():
    rates = torch.tensor([0.01, 0.1], dtype=F64)
    default, _ = train_many(loss, start(2), rates, 10)
    told, _ = train_many(loss, start(2), rates, 10, "adam", True)
    assert all(torch.equal(default[name], told[name]) for name in told)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_that_diverges_does_not_disturb_the_others(optimizer):
    rates = torch.tensor([0.01, 1e6, 0.1], dtype=F64)
    first = start(3)
    first["A"][1] *= 1e80
    together, curve = train_many(loss, first, rates, 20, optimizer)
    assert not torch.isfinite(curve[:, 1]).all()
    keep = [0, 2]
    apart, calm = train_many(loss, {n: v[keep] for n, v in first.items()}, rates[keep], 20, optimizer)
    assert torch.isfinite(calm).all() and torch.equal(curve[:, keep], calm)
    assert all(torch.equal(together[name][keep], apart[name]) for name in apart)


def test_training_leaves_the_start_as_it_was_and_returns_plain_numbers(rng_untouched):
    first = start(2)
    before = {name: value.clone() for name, value in first.items()}
    trained, curve = train_many(loss, first, torch.tensor([0.1, 0.1]), 5)
    assert all(torch.equal(first[name], before[name]) and not first[name].requires_grad for name in first)
    assert not any(value.requires_grad for value in [curve, *trained.values()])
    assert not any(torch.equal(trained[name], before[name]) for name in first)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"optimizer": "adamw"}, ["'adamw'", "'adam' or 'sgd'"]),
        ({"optimizer": None}, ["None", "'adam' or 'sgd'"]),
        ({"lrs": [0.1, 0.1]}, ["[0.1, 0.1]", "torch.tensor(lrs)"]),
        ({"lrs": torch.ones(3)}, ["initial['A']", "(2, 5, 3)", "(3,)"]),
        ({"lrs": torch.ones(2, 2)}, ["initial['A']", "(2, 5, 3)", "(2, 2)"]),
        ({"loss": lambda p, t: loss(p, t).sum()}, ["shape ()", "one loss for each run", "(2,)"]),
        ({"loss": lambda p, t: loss(p, t)[:, None]}, ["shape (2, 1)", "one loss for each run", "(2,)"]),
    ],
)
def test_bad_training_is_refused_and_leaves_the_start_as_it_was(arguments, says, refused):
    first = start(2)
    good = {"loss": loss, "initial": first, "lrs": torch.tensor([0.1, 0.1]), "steps": 3}
    refused(lambda: train_many(**{**good, **arguments}), *says)
    assert all(torch.equal(first[name], value) for name, value in start(2).items())


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_cross_entropy_is_each_runs_mean(shape):
    logits = randn(*shape, 6, 5)
    y = torch.randint(0, 5, (*shape, 6), generator=torch.Generator().manual_seed(1))
    losses, shared = cross_entropy_many(logits, y), cross_entropy_many(logits, torch.arange(6) % 5)
    assert losses.shape == shared.shape == shape
    for run in np.ndindex(*shape):
        p = np.exp(logits[run].numpy())
        p /= p.sum(-1, keepdims=True)
        assert losses[run].item() == pytest.approx(-np.log(p[range(6), y[run].numpy()]).mean())
        assert shared[run].item() == pytest.approx(-np.log(p[range(6), np.arange(6) % 5]).mean())


# classifiers: seeds × rates

RATES = [2.0**-9, 2.0**-6, 2.0**-4]  # exact in float32
IMAGES, LABELS = randn(40, 64, seed=4), torch.arange(40) % 3


def whole(seed):
    return seeded(seed, lambda: DigitClassifier(6, 3)).double()


def last_layer_only(seed):
    model = whole(seed)
    model.layers[:2].requires_grad_(False)
    return model


def subspace(seed):
    return RandomSubspace(whole(seed), 9, "fastfood", torch.Generator().manual_seed(seed))


def low_rank(seed):
    return seeded(seed, lambda: LowRankUpdate(whole(seed), 2)).double()


BUILDS = [whole, last_layer_only, subspace, low_rank]


def loaded(model, parameters):
    """A copy of the model with these numbers in it."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(parameters)
    return twin


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("build", BUILDS)
def test_fit_equals_torch_optim_seed_by_seed_and_rate_by_rate(build, optimizer):
    models, steps, batch = [build(seed) for seed in (0, 1)], 8, 16
    before = [copy.deepcopy(m.state_dict()) for m in models]
    fitted = fit(models, IMAGES, LABELS, RATES, steps, batch, optimizer)
    assert fitted.curve.shape == (steps, 2, 3) and fitted.lrs == RATES

    picks = batch_indices(len(IMAGES), batch, steps, [0, 1])
    for seed in (0, 1):
        for rate in range(3):
            twin = copy.deepcopy(models[seed])
            trained = [p for p in twin.parameters() if p.requires_grad]
            step = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer](trained, lr=RATES[rate])
            schedule = torch.optim.lr_scheduler.LambdaLR(step, lambda t: 1 - t / steps)
            for t in range(steps):
                value = nn.functional.cross_entropy(twin(IMAGES[picks[t, seed]]), LABELS[picks[t, seed]])
                assert fitted.curve[t, seed, rate].item() == pytest.approx(value.item(), rel=1e-4)
                step.zero_grad()
                value.backward()
                step.step()
                schedule.step()
            found = fitted.parameters(seed, rate)
            for name, value in twin.state_dict().items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    for model, state in zip(models, before):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("build", BUILDS)
def test_scores_are_the_accuracies_of_the_models_with_those_parameters_and_the_best_rate_has_the_best_mean(build):
    models = [build(seed) for seed in range(3)]
    fitted = fit(models, IMAGES, LABELS, RATES, 40, 16)
    scores = fitted.scores(IMAGES, LABELS)
    for seed in range(3):
        for rate in range(3):
            guesses = loaded(models[seed], fitted.parameters(seed, rate))(IMAGES).argmax(1)
            assert scores[seed, rate].item() == pytest.approx((guesses == LABELS).sum().item() / 40)
    assert scores.shape == (3, 3) and not scores.requires_grad and len(scores.unique()) > 1
    assert fitted.best(IMAGES, LABELS) == np.argmax(scores.numpy().mean(0))


def test_fit_learns_and_takes_a_batch_larger_than_the_data_as_all_of_it(rng_untouched):
    fitted = fit([whole(0), whole(1)], IMAGES, LABELS, [0.02], 60, batch=1000)
    assert (fitted.curve[-1] < 0.3 * fitted.curve[0]).all()


def test_fit_refuses_models_that_train_nothing(refused):
    frozen = [whole(0).requires_grad_(False)]
    refused(lambda: fit(frozen, IMAGES, LABELS, RATES, 3), "DigitClassifier trains nothing", "requires_grad_(True)")


def test_training_runs_on_one_thread_and_puts_the_number_back():
    threads, seen = torch.get_num_threads(), []

    def loss(p, step):
        seen.append(torch.get_num_threads())
        return p["x"].square().sum(1)

    torch.set_num_threads(2)
    try:
        train_many(loss, {"x": torch.ones(3, 5)}, torch.full((3,), 0.1), 2)
        assert seen == [1, 1] and torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            with one_thread():
                raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_fit_refuses_no_models_and_unequal_labels(refused):
    X, y = torch.zeros(9, 64), torch.zeros(9, dtype=torch.int64)
    refused(lambda: fit([], X, y, [0.1]), "0 models", "pass a model a seed")
    refused(lambda: fit([DigitClassifier(7, 3)], X, y[:8], [0.1]), "9 images, 8 labels", "a label an image")


def test_train_many_refuses_no_steps(refused):
    start = {"x": torch.ones(3, 5)}
    refused(lambda: train_many(lambda p, t: p["x"].sum(1), start, torch.ones(3), 0), "steps = 0", "at least 1")
