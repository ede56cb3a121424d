"""batched.py: many adapters on one base compute and train as each does by itself."""

import copy

import pytest
import torch
from torch import nn

from lora_ref import LoRAConfig, add_lora, count_parameters, load_adapter, lora_parameters, merge, save_adapter
from lora_ref.batched import BatchedLoRALinear, adapter_parameters, add_batched_lora, for_each_adapter, single_adapter
from lora_ref.course.finetune.hub import load_model
from tests.course.finetune.tiny_models import llama

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


def batched_model(configs=None, base=None, numbers=True):
    model = add_batched_lora(
        base or network(), configs or [config(e) for e in range(3)], [generator(e) for e in range(3)]
    )
    if numbers:
        for e in range(3):
            with single_adapter(model, e):
                filled(model, e)
    return model


def single_model(e, base=None, numbers=True):
    model = add_lora(base or network(), config(e), generator=generator(e))
    return filled(model, e) if numbers else model


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# the layer


def test_every_adapter_starts_bit_for_bit_as_in_add_lora():
    model = batched_model(numbers=False)
    assert isinstance(model[0], BatchedLoRALinear) and model[0].weight is model[0].adapters[2].weight
    for e in range(3):
        expected = lora_parameters(single_model(e, numbers=False))
        with single_adapter(model, e):
            found = lora_parameters(model)
        assert list(found) == list(expected) and all(torch.equal(found[n], expected[n]) for n in expected)
        assert [id(p) for p in adapter_parameters(model, e)] == [id(p) for p in found.values()]


@pytest.mark.parametrize("shape", [(6, 6), (6, 5, 6), (3, 2, 2, 6), (0, 6)])
def test_each_group_of_rows_passes_through_its_own_adapter(shape):
    x, model = randn(*shape, seed=1), batched_model()
    y = model(x)
    assert y.shape == (*shape[:-1], 4)
    for e, (mine, found) in enumerate(zip(x.chunk(3), y.chunk(3))):
        close(found, single_model(e)(mine))


def test_any_layout_will_do():
    x = randn(5, 6, 6, seed=1).transpose(0, 1)
    close(batched_model()(x), batched_model()(x.contiguous()))


def test_the_gradient_of_a_loss_is_its_adapters_own_and_autograds_on_the_matrix():
    x, model = randn(6, 6, seed=1), batched_model()
    losses = model(x).square().view(3, -1).sum(1)
    for e in range(3):
        others = [p for other in range(3) if other != e for p in adapter_parameters(model, other)]
        found = torch.autograd.grad(
            losses[e], adapter_parameters(model, e) + others, retain_graph=True, allow_unused=True
        )
        own, rest = found[: len(adapter_parameters(model, e))], found[len(adapter_parameters(model, e)) :]
        assert all(g is None or not g.any() for g in rest) and all(g.any() for g in own)
        (A1, B1, A2, B2), s = [p.detach().requires_grad_() for p in adapter_parameters(model, e)], ALPHAS[e] / RANKS[e]
        first, last = network()[0], network()[2]
        h = (x[2 * e : 2 * e + 2] @ (first.weight + s * B1 @ A1).T).tanh()
        y = h @ (last.weight + s * B2 @ A2).T + last.bias
        for mine, theirs in zip(own, torch.autograd.grad(y.square().sum(), [A1, B1, A2, B2])):
            close(mine, theirs)


def test_what_is_frozen_has_no_gradient_and_the_base_is_counted_once():
    model = batched_model()
    model(randn(6, 6)).sum().backward()
    trained = {id(p) for e in range(3) for p in adapter_parameters(model, e)}
    assert all((p.grad is not None) == p.requires_grad == (id(p) in trained) for p in model.parameters())
    number = sum(RANKS) * (6 + 8 + 8 + 4)
    assert count_parameters(model) == (number, number + 6 * 8 + 8 * 4 + 4)
    with single_adapter(model, 1):
        assert count_parameters(model) == count_parameters(single_model(1))


@pytest.mark.parametrize("autocast", [False, True], ids=["16-bit base", "autocast"])
def test_in_16_bits_outputs_are_those_of_LoRALinear_and_gradients_have_32_bits(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16

    def found(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x.to(dtype))
        y.float().square().sum().backward()
        return y

    x, model = randn(6, 6, seed=1), batched_model(base=network().to(dtype))
    assert {p.dtype for e in range(3) for p in adapter_parameters(model, e)} == {torch.float32}
    y = found(model, x)
    assert y.dtype == torch.bfloat16
    for e, (mine, part) in enumerate(zip(x.chunk(3), y.chunk(3))):
        single = single_model(e, base=network().to(dtype))
        close(part, found(single, mine), 0.1)
        for a, b in zip(adapter_parameters(model, e), lora_parameters(single).values()):
            assert a.grad.dtype == torch.float32 and (a.grad - b.grad).norm() <= 0.05 * b.grad.norm()


def test_dropout_acts_on_the_adapters_input_only_while_training_with_a_mask_for_each():
    configs = [config(e, lora_dropout=p) for e, p in enumerate((0.0, 0.5, 0.5))]
    x = randn(2, 6, seed=1).repeat(3, 1)
    started = batched_model(configs, numbers=False).train()
    close(started(x), network()(x))  # B = 0: the base sees all of x
    model = batched_model(configs).train()
    one, two = model(x).chunk(3), model(x).chunk(3)
    assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1]) and not torch.equal(one[2], two[2])
    close(model.eval()(x), batched_model()(x))
    layer = model[0].train()
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    assert (mean - layer.eval()(x)).abs().max() < 0.3


# a single adapter


def test_single_adapter_gives_the_ordinary_model_and_restores_everything(tmp_path):
    model, x = batched_model(), randn(4, 6, seed=2)
    names, before = list(dict(model.named_parameters())), copy.deepcopy(model.state_dict())
    for e in range(3):
        with single_adapter(model, e) as same:
            assert same is model and not any(isinstance(m, BatchedLoRALinear) for m in model.modules())
            expected = single_model(e).eval()
            close(model.eval()(x), expected(x))
            merge(model)
            close(model(x), expected(x))
        assert model.training is False and all(not layer.training for layer in model.modules())
    assert not any(a.merged for m in model.modules() if isinstance(m, BatchedLoRALinear) for a in m.adapters)
    assert list(dict(model.named_parameters())) == names and not hasattr(model, "lora_plan")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert for_each_adapter(model, lambda m: m(x).sum().item()) == pytest.approx(
        [single_model(e)(x).sum().item() for e in range(3)]
    )
    with pytest.raises(ZeroDivisionError), single_adapter(model, 1):
        raise ZeroDivisionError
    close(model(x[:3]), batched_model()(x[:3]))


def test_a_single_adapter_is_saved_and_loads_here_and_in_peft(tmp_path):
    from peft import PeftModel

    name = llama(tmp_path / "model")
    configs = [config(e, exclude_modules=["o_proj"]) for e in range(3)]
    model = batched_model(configs, load_model(name))
    ids = torch.arange(24).view(3, 8)
    logits = model.eval()(ids).logits
    for e in range(3):
        with single_adapter(model, e):
            save_adapter(model, tmp_path / str(e))
        for load in (load_adapter, PeftModel.from_pretrained):
            close(load(load_model(name), str(tmp_path / str(e))).eval()(ids[e : e + 1]).logits, logits[e : e + 1], 1e-4)


def test_the_batched_model_is_not_saved_as_if_it_had_one_adapter(refused, tmp_path):
    refused(lambda: save_adapter(batched_model(), tmp_path / "all"), "adapted by hand")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_activations_change_no_gradient(tmp_path, dtype):
    name, ids, found = llama(tmp_path / "model"), torch.arange(24).view(3, 8), []
    for checkpointing in (False, True):
        model = batched_model(base=load_model(name).to(dtype)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids).logits.float().log_softmax(-1)[..., 5].mean(1).sum().backward()
        found.append([p.grad for e in range(3) for p in adapter_parameters(model, e)])
    assert all(g.any() for g in found[0]) and all(torch.equal(a, b) for a, b in zip(*found))


# refusals


@pytest.mark.parametrize(
    "changes, says",
    [
        ([{}, {}, {"target_modules": ["2"]}], ["mean different layers (0)"]),
        ([{}, {"bias": "all"}, {}], ["bias = 'all'", "'none'"]),
        ([{}, {"target_modules": ["0"], "modules_to_save": ["2"]}, {}], ["different layers (2)"]),
        ([{"target_modules": ["0"], "modules_to_save": ["2"]}] * 3, ["modules_to_save = ['2']"]),
        ([{}, {}, {"init_lora_weights": "pissa"}], ["'pissa'", "keeps W0"]),
        ([{}, {}, {"r": 5}], ["2: r = 5"]),
        ([{}, {}, {"target_modules": ["q_proj"]}], ["'q_proj'"]),
        ([{"target_modules": ["1"]}] * 3, ["Tanh"]),
    ],
)
def test_what_cannot_share_a_base_is_refused_and_the_model_stays_as_it_was(changes, says, refused):
    model, flags = network(), [True, False, True]
    for p, flag in zip(model.parameters(), flags):
        p.requires_grad_(flag)
    before = list(model.modules())
    refused(lambda: batched_model([config(e, **own) for e, own in enumerate(changes)], model, False), *says)
    assert list(model.modules()) == before and [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "lora_plans")


def test_more_that_is_refused(refused):
    refused(lambda: add_batched_lora(network(), [], []), "0 configs, 0 generators")
    refused(lambda: add_batched_lora(network(), [config(0)], [None, None]), "1 configs, 2 generators")
    embedding = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 4))
    refused(
        lambda: add_batched_lora(embedding, [config(0, target_modules=["0"])], [None]), "0 is a Embedding", "nn.Linear"
    )
    model = batched_model()
    refused(lambda: model(randn(7, 6)), "(7, 6)", "3 groups")
    refused(lambda: batched_model(base=model), "adapted already")
    refused(lambda: single_adapter(model, 3).__enter__(), "3 adapters side by side now, not number 3")
    refused(lambda: single_adapter(single_model(0), 0).__enter__(), "0 adapters")
    refused(lambda: for_each_adapter(network(), len), "0 adapters")
    with single_adapter(model, 0):
        refused(lambda: single_adapter(model, 1).__enter__(), "0 adapters side by side now")
