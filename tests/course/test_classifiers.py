"""course/models.py: the classifier and its low-rank update against numpy, seeds that leave no trace."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lora_ref import LoRAConfig, LoRALinear, initialization
from lora_ref.course.classifiers import (
    DigitClassifier,
    LowRankUpdate,
    accuracy,
    seeded,
    trainable,
    with_lora,
    with_values,
)


@pytest.mark.parametrize("width, classes", [(64, 10), (7, 3)])
def test_the_classifier_is_three_affine_maps_with_tanh_between(width, classes):
    model = seeded(0, lambda: DigitClassifier(width, classes)).double()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    W, b = zip(*[(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in model.layers])
    assert [w.shape for w in W] == [(width, 64), (width, width), (classes, width)]
    hidden = np.tanh(W[1] @ np.tanh(W[0] @ x.numpy().T + b[0][:, None]) + b[1][:, None])
    np.testing.assert_allclose(model(x).detach().numpy(), (W[2] @ hidden + b[2][:, None]).T, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) == 65 * width + (width + 1) * width + (width + 1) * classes


def test_a_seed_decides_the_start_and_leaves_the_global_generator_alone(rng_untouched):
    first, again, other = (seeded(seed, DigitClassifier).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_build_that_fails_leaves_the_global_generator_alone_too(rng_untouched):
    with pytest.raises(ZeroDivisionError):
        seeded(3, lambda: torch.randn(4) / (1 // 0))


def test_the_start_does_not_depend_on_what_was_drawn_before():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        first = seeded(3, lambda: torch.randn(4))
        torch.randn(7)
        assert torch.equal(seeded(3, lambda: torch.randn(4)), first)


def test_accuracy_is_the_share_of_right_answers_of_each_run():
    logits = torch.tensor([[[2.0, 1, 0], [0, 1, 2], [0, 3, 1], [5, 4, 6]], [[0, 1, 0]] * 4])
    y = torch.tensor([0, 2, 1, 0])
    assert accuracy(logits, y).tolist() == [0.75, 0.25]
    assert accuracy(logits[0], y).item() == 0.75
    assert accuracy(logits, torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])).tolist() == [0.25, 0.75]
    assert accuracy(logits[None], y).shape == (1, 2)


IMAGES = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def updated(r, width=7, classes=3):
    """A classifier, and its low-rank update with B away from 0."""
    model = seeded(0, lambda: DigitClassifier(width, classes))
    low_rank = seeded(1, lambda: LowRankUpdate(model, r))
    for B in low_rank.B:
        B.data = torch.randn(B.shape, generator=torch.Generator().manual_seed(2))
    return model, low_rank


def test_a_low_rank_update_starts_as_the_model_bit_for_bit():
    model = seeded(0, lambda: DigitClassifier(7, 3))
    assert torch.equal(LowRankUpdate(model, 2)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("r", [1, 2, 5, 100])
def test_a_low_rank_update_is_the_model_with_W0_plus_B_A_of_rank_at_most_r(r):
    model, low_rank = updated(r)
    merged = copy.deepcopy(model)
    for layer, B, A in zip(merged.layers, low_rank.B, low_rank.A):
        d, k = layer.weight.shape
        delta = (B @ A).detach()
        assert B.shape == (d, min(r, d, k)) and A.shape == (min(r, d, k), k)
        assert np.linalg.matrix_rank(delta.numpy()) == min(r, d, k)
        layer.weight.data += delta
    torch.testing.assert_close(low_rank(IMAGES), merged(IMAGES))
    assert not torch.allclose(low_rank(IMAGES), model(IMAGES))


def test_a_low_rank_update_trains_A_and_B_alone_and_leaves_the_model_as_it_was():
    model, low_rank = updated(2)
    assert trainable(low_rank) == 2 * (7 + 64) + 2 * (7 + 7) + 2 * (3 + 7)
    low_rank(IMAGES).sum().backward()
    for name, parameter in low_rank.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (not name.startswith("model.")), name
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_A_starts_with_variance_1_over_k_and_B_at_0():
    low_rank = seeded(3, lambda: LowRankUpdate(DigitClassifier(48, 10), 40))
    for A, B in zip(low_rank.A, low_rank.B):
        spread = A.std().item() * A.shape[1] ** 0.5
        assert abs(spread - 1) < 5 / (2 * A.numel()) ** 0.5 and not B.any()


@pytest.mark.parametrize("model, r, says", [(DigitClassifier(7, 3), 0, "r = 0"), (DigitClassifier(7, 3), -2, "r = -2")])
def test_a_low_rank_update_refuses_a_rank_below_1(model, r, says, refused):
    refused(lambda: LowRankUpdate(model, r), says, "at least 1")
    assert all(p.requires_grad for p in model.parameters())


def test_a_low_rank_update_refuses_a_model_without_weight_matrices(refused):
    refused(lambda: LowRankUpdate(nn.LayerNorm(7), 2), "LayerNorm", "a model with linear layers")


def test_trainable_counts_what_requires_a_gradient():
    model = DigitClassifier(7, 3)
    assert trainable(model) == 65 * 7 + 8 * 7 + 8 * 3
    model.layers[0].requires_grad_(False)
    assert trainable(model) == 8 * 7 + 8 * 3
    assert trainable(model.requires_grad_(False)) == 0


def test_with_values_is_a_copy_with_these_numbers_and_leaves_the_model_as_it_was():
    model, other = (seeded(seed, lambda: DigitClassifier(7, 3)) for seed in (0, 1))
    before = model(IMAGES)
    filled = with_values(model, other.state_dict())
    assert torch.equal(filled(IMAGES), other(IMAGES)) and torch.equal(model(IMAGES), before)
    filled.layers[0].weight.data.zero_()
    assert other.layers[0].weight.any()


def test_merged_is_the_same_function_in_plain_weights():
    model = seeded(0, lambda: DigitClassifier(7, 3))
    low_rank = seeded(1, lambda: LowRankUpdate(model, 2))
    with torch.no_grad():
        for B in low_rank.B:
            B.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    merged = low_rank.merged()
    assert torch.allclose(merged(x), low_rank(x), atol=1e-5) and not torch.allclose(merged(x), model(x), atol=1e-2)
    for name, W in merged.named_parameters():
        assert W.shape == dict(model.named_parameters())[name].shape


def test_a_low_rank_update_freezes_w0_and_keeps_its_dtype():
    model = DigitClassifier(7, 3).to(torch.bfloat16)
    low_rank = LowRankUpdate(model, 2)
    assert low_rank(torch.zeros(4, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {name[0] for name, p in low_rank.named_parameters() if p.requires_grad} == {"A", "B"}
    assert trainable(low_rank) == 2 * (7 + 64) + 2 * (7 + 7) + 2 * (3 + 7)


def test_with_lora_adapts_the_named_layers_of_a_copy_and_starts_as_the_model(rng_untouched):
    model = seeded(0, lambda: DigitClassifier(24))
    before = copy.deepcopy(model.state_dict())
    adapted = with_lora(model, LoRAConfig(r=3, lora_alpha=7), seed=2, layers=(0, 2))
    assert [type(layer) for layer in adapted.layers] == [LoRALinear, nn.Linear, LoRALinear]
    assert trainable(adapted) == 3 * (64 + 24) + 3 * (24 + 10) and trainable(model) == sum(
        p.numel() for p in model.parameters()
    )
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(adapted(x), model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again, other = (with_lora(model, LoRAConfig(r=3, lora_alpha=7), seed, (0, 2)) for seed in (2, 3))
    assert torch.equal(again.layers[0].lora_A, adapted.layers[0].lora_A)
    assert not torch.equal(other.layers[0].lora_A, adapted.layers[0].lora_A)


def test_with_lora_asks_a_start_layer_by_layer():
    model, seen = seeded(0, lambda: DigitClassifier(24)), []

    def start(W, r, s, generator):
        seen.append((tuple(W.shape), r, s))
        return initialization.random(W, r, s, generator, std=0.1)

    adapted = with_lora(model, LoRAConfig(r=3, lora_alpha=6), layers=(0, 1), init_fn=start)
    assert seen == [((24, 64), 3, 2.0), ((24, 24), 3, 2.0)] and adapted.layers[1].lora_B.abs().min() > 0
