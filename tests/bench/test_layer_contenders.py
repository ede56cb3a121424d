"""lora_ref.bench.layer_contenders: equal layers under the clock."""

import pytest
import torch

from lora_ref.bench.layer_contenders import Layer, contenders, inputs

CPU = torch.device("cpu")
FACTORED = Layer(d=48, k=80, N=40, r=3)


def count_trained(layer):
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_contenders_compute_the_same_and_train_what_they_should(dtype):
    case = Layer(48, 80, 600, 3, 0.0, dtype)
    layers = contenders(case, CPU)
    assert list(layers) == ["frozen", "lora_ref", "peft", "loralib", "parametrised", "full"]
    x, gradient = inputs(case, CPU)
    frozen, results = layers["frozen"](x), {}
    for name in ("lora_ref", "peft", "loralib", "parametrised"):
        y = layers[name](x)
        results[name] = [y, *torch.autograd.grad(y, x, gradient)]
        assert not torch.equal(y, frozen)
        assert count_trained(layers[name]) == 3 * (48 + 80)
    for name, (y, dx) in results.items():
        scale = 3e-6 if dtype == torch.float32 else 3e-2
        for mine, theirs in zip(results["lora_ref"], (y, dx), strict=True):
            assert (mine - theirs).norm() <= scale * theirs.norm(), name
    assert count_trained(layers["full"]) == 48 * 80 + 48
    assert count_trained(layers["frozen"]) == 0


def test_a_weight_has_no_dropout():
    assert "parametrised" not in contenders(FACTORED._replace(p=0.1), CPU)
