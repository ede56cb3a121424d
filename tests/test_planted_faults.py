"""Faults that LoRA code has had, planted one at a time: each must fail the check that is there to find it.

A fault is a change to the text of one module. The package is then loaded anew with the changed module, under
another name, and the check runs on it; on the package as it is, every check passes.
"""

import contextlib
import copy
import importlib
import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_ref

PACKAGE = Path(lora_ref.__file__).parent
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Fault(NamedTuple):
    what: str
    module: str
    old: str  # occurs exactly once in the module
    new: str


KAIMING = "Init(new(r, W.shape[1]).uniform_(-1, 1, generator=generator) / math.sqrt(W.shape[1]), new(len(W), r), W)"
ALIKE = KAIMING.replace("new(r,", "new(1,").replace("generator)", "generator).repeat(r, 1)")
FROM_THE_OUTPUT = """
    if training and dropout_p:
        return F.linear(x, weight, bias) + F.dropout(scale * F.linear(F.linear(x, A), B), dropout_p)
    p = 0.0"""
BETWEEN = """
    if training and dropout_p:
        return F.linear(x, weight, bias) + scale * F.linear(F.dropout(F.linear(x, A), dropout_p), B)
    p = 0.0"""
ROUNDED = "W0, BA = self.weight, self.delta_weight().to(self.weight.dtype)"
CONV1D = """        return W.T

    def base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear("""

FAULTS = {  # by the check that must find them
    "the_layer_is_pefts": [
        Fault("1/r dropped", "config", "/ (math.sqrt(r) if use_rslora else r)", ""),
        Fault("always 1/√r", "config", "(math.sqrt(r) if use_rslora else r)", "math.sqrt(r)"),
        Fault("rsLoRA ignored", "config", "(math.sqrt(r) if use_rslora else r)", "r"),
        Fault("r/α", "config", "float(lora_alpha) / (", "1 / float(lora_alpha) * ("),
    ],
    "the_gradient_is_autograds": [
        Fault("H not scaled", "functional", "bias), H, b.t(), s)", "bias), H, b.t(), 1.0)"),
        Fault("s twice", "functional", "bias), H, b.t(), s)", "bias), H, b.t(), s * s)"),
        Fault("B·A subtracted", "functional", "bias), H, b.t(), s)", "bias), H, b.t(), -s)"),
        Fault("no bias", "functional", "F.linear(X, W0, bias), H", "F.linear(X, W0), H"),
        Fault("base forgotten", "functional", "F.linear(X, W0, bias), H", "0 * F.linear(X, W0, bias), H"),
        Fault("not scaled, W formed", "functional", "(X, torch.addmm(W0, b, a, alpha=s)", "(X, torch.addmm(W0, b, a)"),
        Fault("∂A without s", "functional", "torch.mm(Z.t(), D).mul_(s)", "torch.mm(Z.t(), D)"),
        Fault("∂A with s twice", "functional", "torch.mm(Z.t(), D).mul_(s)", "torch.mm(Z.t(), D).mul_(s * s)"),
        Fault("∂A transposed", "functional", "torch.mm(Z.t(), D).mul_(s)", "torch.mm(D.t(), Z).view_as(A).mul_(s)"),
        Fault("∂A without B", "functional", "Z = torch.mm(g, b)", "Z = g[:, : b.shape[1]]"),
        Fault("∂B without s", "functional", "torch.mm(H.t(), g).mul_(s)", "torch.mm(H.t(), g)"),
        Fault("∂B with s twice", "functional", "torch.mm(H.t(), g).mul_(s)", "torch.mm(H.t(), g).mul_(s * s)"),
        Fault("∂B transposed", "functional", "(H.t(), g).mul_(s).t()", "(H.t(), g).mul_(s).view_as(B)"),
        Fault("∂x of the base alone", "functional", "_add_product(torch.mm(G, W0), Z, a, s)", "torch.mm(G, W0)"),
        Fault("∂x without s", "functional", "(torch.mm(G, W0), Z, a, s)", "(torch.mm(G, W0), Z, a, 1.0)"),
        Fault("∂x without the base", "functional", "_add_product(torch.mm(G, W0), Z, a, s)", "s * torch.mm(Z, a)"),
        Fault("∂x not scaled, W formed", "functional", "(G, torch.addmm(W0, b, a, alpha=s", "(G, torch.addmm(W0, b, a"),
        Fault("∂b of one row", "functional", "G.sum(0) if", "G[0] if"),
        Fault("∂W0 transposed", "functional", "torch.mm(G.t(), X)", "torch.mm(X.t(), G).view_as(W0)"),
    ],
    "the_second_derivative_is_autograds": [
        Fault("H taken for a constant", "functional", "again = need_B and", "again = False and"),
    ],
    "x_and_r_numbers_a_row_are_kept": [
        Fault("a copy of x", "functional", "            X if need_A or", "            X.clone() if need_A or"),
        Fault("a dropped x", "functional", "            X if need_A or", "            dropped * 1 if need_A or"),
        Fault("the update", "functional", "    H if need_B", "    torch.mm(H, b.t())[:, :3] if need_B"),
    ],
    "a_small_update_survives_16_bits": [
        Fault("W formed in 16 bits", "functional", "dtype in (torch.float32, torch.float64) and N", "N"),
    ],
    "dropout_is_of_the_adapters_input": [
        Fault("of the output", "functional", "\n    p = dropout_p if training else 0.0", FROM_THE_OUTPUT),
        Fault("between A and B", "functional", "\n    p = dropout_p if training else 0.0", BETWEEN),
        Fault("of the base's input too", "functional", "F.linear(X, W0, bias), H", "F.linear(dropped, W0, bias), H"),
        Fault("no 1/(1 − p)", "functional", "s / (1 - p)", "s"),
        Fault("1/(1 − p) twice", "functional", "s / (1 - p)", "s / (1 - p) ** 2"),
        Fault("1/p", "functional", "s / (1 - p)", "s / p"),
        Fault("p for 1 − p", "functional", ">= round(p * DROPOUT_LEVELS)", "< round(p * DROPOUT_LEVELS)"),
        Fault("in eval too", "functional", "p = dropout_p if training else 0.0", "p = dropout_p"),
        Fault("no mask in ∂A", "functional", "D = X * keep if create_graph else keep.mul_(X)", "pass"),
        Fault("no mask in ∂x", "functional", ".mul_(keep).addmm_(G, W0)", ".addmm_(G, W0)"),
        Fault("no mask in ∂B", "functional", "    H if need_B else None,", "    torch.mm(X, a.t()),"),
        Fault("another mask in the backward", "functional", "(mask, G.dtype)", "(mask.flip(0), G.dtype)"),
        Fault("the base's ∂x masked", "functional", ".mul_(keep).addmm_(G, W0)", ".addmm_(G, W0).mul_(keep)"),
    ],
    "the_layers_dropout_is_for_training": [
        Fault("always", "layers", "            self.training,\n", "            True,\n"),
        Fault("never", "layers", "            self.training,\n", "            False,\n"),
    ],
    "it_begins_as_the_base_and_B_moves_first": [
        Fault("A = 0, B random", "initialization", KAIMING, "zero_a(W, r, s, generator)"),
        Fault("A = B = 0", "initialization", KAIMING, "Init(new(r, W.shape[1]), new(len(W), r), W)"),
        Fault("both random", "initialization", KAIMING, KAIMING.replace("r), W)", "r).normal_(), W)")),
        Fault("rows of A alike", "initialization", KAIMING, ALIKE),
        Fault("A as wide as 1/√r", "initialization", KAIMING, KAIMING.replace("math.sqrt(W.shape[1])", "math.sqrt(r)")),
    ],
    "pissa_is_pefts": [
        Fault("without s", "initialization", "(S[:r] / s).sqrt()", "S[:r].sqrt()"),
        Fault("s on one factor", "initialization", "root[:, None] * Vh[:r]", "s * root[:, None] * Vh[:r]"),
        Fault("nothing taken off", "initialization", "W.detach().to(A.dtype) - s * (B @ A)", "W.detach().clone()"),
        Fault("B·A taken off, not s·B·A", "initialization", "- s * (B @ A)", "- B @ A"),
        Fault("shared W written", "layers", "self.weight = _parameter(self.matrix_to_w", "self.weight.data.copy_(self.matrix_to_w"),
        Fault("W0 not used", "layers", "self.weight = _parameter(self.matrix_to_w", "_parameter(self.matrix_to_w"),
    ],
    "only_the_factors_are_trained": [
        Fault("base trained", "layers", "self.weight.requires_grad_(False)", "self.weight.requires_grad_(True)"),
        Fault("bias trained", "layers", 'requires_grad_(config.bias != "none")', "requires_grad_(True)"),
        Fault("bias never trained", "layers", 'requires_grad_(config.bias != "none")', "requires_grad_(False)"),
        Fault("A no parameter", "layers", "= _parameter(init.A),", "= init.A,"),
    ],
    "merging_is_pefts_and_leaves_the_base": [
        Fault("s twice", "layers", "self.scale * (self.lora_B", "self.scale**2 * (self.lora_B"),
        Fault("no s", "layers", "self.scale * (self.lora_B", "(self.lora_B"),
        Fault("into the base", "layers", "self.merged_weight = (W0.to", "self.merged_weight = W0.copy_(W0.to"),
        Fault("rounded twice", "layers", "W0, BA = self.weight, self.delta_weight()", ROUNDED),
        Fault("Conv1D not transposed", "layers", CONV1D, CONV1D.replace("W.T", "W.reshape(W.T.shape)")),
        Fault("added again", "layers", "(x, self.merged_weight)", "(x, self.merged_weight + self.delta_weight())"),
    ],
    "the_merge_follows_train_state_and_steps": [
        Fault("train() leaves it", "layers", "        if mode:\n            self.merged_weight = None", "        pass"),
        Fault("eval() merges", "layers", "super().train(mode)", "super().train(mode or bool(self._form()))"),
        Fault("in the state dict", "layers", "None, persistent=False)", "None, persistent=True)"),
        Fault("stale", "layers", "if self._versions != self._current():", "if False:"),
        Fault("no gradient", "layers", "torch.is_grad_enabled() and (", "False and ("),
    ],
}  # fmt: skip


@contextlib.contextmanager
def package(fault=None):
    """lora_ref loaded anew, as `planted`, with one module's text changed."""
    planted = types.ModuleType("planted")
    planted.__path__ = [str(PACKAGE)]
    sys.modules["planted"] = planted
    try:
        if fault:
            path = PACKAGE / f"{fault.module}.py"
            source = path.read_text(encoding="utf-8")
            assert source.count(fault.old) == 1, f"{fault.old!r} is not in {path.name} once: plant the fault elsewhere"
            name = f"planted.{fault.module}"
            module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
            sys.modules[name] = module
            exec(compile(source.replace(fault.old, fault.new), str(path), "exec"), module.__dict__)
        for name in ("config", "functional", "initialization", "layers"):
            setattr(planted, name, importlib.import_module(f"planted.{name}"))
        yield planted
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "planted"]:
            del sys.modules[name]


# the checks


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def close(found, truth, tolerance=1e-10):
    assert found.shape == truth.shape
    assert (found - truth).norm() <= tolerance * truth.norm()


def problem(N, d=5, k=7, r=3):
    shapes = {"x": (N, k), "weight": (d, k), "bias": (d,), "A": (r, k), "B": (d, r)}
    return {name: normal(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(shapes.items())}


def formula(x, weight, bias, A, B, s, mask=1.0):
    return x @ weight.mT + bias + s * ((x * mask) @ A.mT @ B.mT)


def the_gradient_is_autograds(lora):
    for N in (6, 200):
        assert lora.functional.should_materialize(N, 5, 7, F64) == (N == 200)
        parts, G = problem(N), normal(N, 5, seed=9)
        y, z = lora.functional.lora_linear(*parts.values(), 0.7), formula(*parts.values(), 0.7)
        close(y, z)
        for own, other in zip(*(torch.autograd.grad(out, list(parts.values()), G) for out in (y, z))):
            close(own, other)


def the_second_derivative_is_autograds(lora):
    parts = problem(6)

    def second(function):
        y = function(*parts.values(), 0.7)
        first = torch.autograd.grad(y.pow(3).sum(), list(parts.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(parts.values()))

    for own, other in zip(second(lora.functional.lora_linear), second(formula)):
        close(own, other)


def x_and_r_numbers_a_row_are_kept(lora):
    for p in (0.0, 0.3):
        parts, kept = problem(20), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            lora.functional.lora_linear(*parts.values(), 0.7, p, True)
        more = [
            t.untyped_storage() for pointer, t in kept.items() if pointer not in {p.data_ptr() for p in parts.values()}
        ]
        assert parts["x"].data_ptr() in kept
        assert sum(storage.nbytes() for storage in more) <= 8 * 20 * 3 + (20 * 7 + 8) * bool(p)


def a_small_update_survives_16_bits(lora):
    """‖ΔW‖ is a hundredth of ‖W0‖: least squares over many rows sees through what each y is rounded by."""
    parts = {name: part.detach().to(BF16) for name, part in problem(5000).items()}
    parts["A"], parts["B"] = 0.1 * normal(3, 7, seed=3, dtype=F32), 0.1 * normal(5, 3, seed=4, dtype=F32)
    moved = lora.functional.lora_linear(*parts.values(), 0.7).double() - F.linear(*list(parts.values())[:3]).double()
    close(torch.linalg.lstsq(parts["x"].double(), moved).solution.mT, 0.7 * (parts["B"] @ parts["A"]).double(), 0.05)


def dropout_is_of_the_adapters_input(lora):
    """The mask is drawn from x's shape alone: identities in place of A and B show it."""
    function, N, p = lora.functional.lora_linear, 400, 0.25
    eye = torch.eye(7, dtype=F64)
    torch.manual_seed(0)
    mask = function(torch.ones(N, 7, dtype=F64), 0 * eye, None, eye, eye, 1.0, p, True)
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    assert abs((mask == 0).double().mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / mask.numel())
    parts, G = problem(N), normal(N, 5, seed=9)
    torch.manual_seed(0)
    y, z = function(*parts.values(), 0.7, p, True), formula(*parts.values(), 0.7, mask)
    close(y, z)
    for own, other in zip(*(torch.autograd.grad(out, list(parts.values()), G) for out in (y, z))):
        close(own, other)
    close(function(*parts.values(), 0.7, p, False), formula(*parts.values(), 0.7))


def layer_of(lora, kind="LoRALinear", base=None, dtype=F32, **options):
    base = base or (nn.Linear(7, 5) if kind == "LoRALinear" else Conv1D(5, 7))
    options = {"r": 3, "lora_alpha": 5} | options
    layer = getattr(lora.layers, kind)(base.to(dtype), lora.config.LoRAConfig(**options))
    with torch.no_grad():
        for i, factor in enumerate((layer.lora_A, layer.lora_B)):
            factor.copy_(normal(*factor.shape, seed=i))
    return layer


def peft_of(layer, base, **options):
    model = nn.Sequential(copy.deepcopy(base))
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["0"], "fan_in_fan_out": isinstance(base, Conv1D)} | options
    other = inject_adapter_in_model(LoraConfig(**config), model)[0]
    other.lora_A["default"].weight.data = layer.lora_A.detach().clone()
    other.lora_B["default"].weight.data = layer.lora_B.detach().clone()
    return other


def the_layer_is_pefts(lora):
    for use_rslora in (False, True):
        base, x = nn.Linear(7, 5), normal(4, 7, dtype=F32)
        layer = layer_of(lora, base=copy.deepcopy(base), use_rslora=use_rslora)
        other = peft_of(layer, base, use_rslora=use_rslora)
        y, z = layer(x), other(x)
        close(y, z, 1e-6)
        y.square().sum().backward(), z.square().sum().backward()
        close(layer.lora_A.grad, other.lora_A["default"].weight.grad, 1e-5)
        close(layer.lora_B.grad, other.lora_B["default"].weight.grad, 1e-5)


def the_layers_dropout_is_for_training(lora):
    layer, x = layer_of(lora, lora_dropout=0.5), normal(50, 7, dtype=F32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    close(layer(x), layer_of(lora, base=_base_of(layer))(x), 1e-6)


def _base_of(layer):
    base = nn.Linear(7, 5)
    base.weight, base.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
    return base


def it_begins_as_the_base_and_B_moves_first(lora):
    base, x = nn.Linear(400, 30), normal(6, 400, dtype=F32)
    layer = lora.layers.LoRALinear(base, lora.config.LoRAConfig(r=20, lora_alpha=5))
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert layer.lora_B.grad.any() and not layer.lora_A.grad.any()
    assert torch.linalg.matrix_rank(layer.lora_A) == 20
    assert 0.99 / math.sqrt(400) < layer.lora_A.abs().max() <= 1 / math.sqrt(400)


def pissa_is_pefts(lora):
    base, x = nn.Linear(7, 5), normal(4, 7, dtype=F32)
    before = base.weight.detach().clone()
    y = base(x).detach()
    config = lora.config.LoRAConfig(r=3, lora_alpha=5, init_lora_weights="pissa")
    layer = lora.layers.LoRALinear(base, config)
    assert torch.equal(base.weight, before)
    close(layer(x), y, 1e-6)
    other = inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=["0"]),
        nn.Sequential(copy.deepcopy(base)),
    )[0]
    close(layer.weight, other.base_layer.weight, 1e-5)
    close(layer.lora_A.abs(), other.lora_A["default"].weight.abs(), 1e-5)
    close(layer.lora_B.abs(), other.lora_B["default"].weight.abs(), 1e-5)


def only_the_factors_are_trained(lora):
    for bias in ("none", "lora_only"):
        layer = layer_of(lora, bias=bias)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(normal(4, 7, dtype=F32)).square().sum().backward()
        optimizer.step()
        changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"lora_A", "lora_B"} | ({"bias"} if bias == "lora_only" else set())


def merging_is_pefts_and_leaves_the_base(lora):
    x = normal(4, 7, dtype=F32)
    for kind, make in (("LoRALinear", lambda: nn.Linear(7, 5)), ("LoRAConv1D", lambda: Conv1D(5, 7))):
        base = make()
        layer = layer_of(lora, kind, copy.deepcopy(base)).eval()
        other = peft_of(layer, base)
        other.merge()
        with torch.no_grad():
            unmerged = layer(x)
            layer.merge()
            close(layer(x), unmerged, 1e-6)
            close(layer(x), other(x), 1e-6)
        layer.unmerge()
        assert torch.equal(layer.weight, base.weight)
    layer = layer_of(lora, base=nn.Linear(70, 50), dtype=BF16)
    layer.merge()
    truth = layer.weight.double() + 5 / 3 * layer.lora_B.double() @ layer.lora_A.double()
    assert ((layer.merged_weight.double() - truth).abs() <= 0.501 * torch.finfo(BF16).eps * truth.abs()).all()


def the_merge_follows_train_state_and_steps(lora):
    layer, x = layer_of(lora).eval(), normal(4, 7, dtype=F32)
    assert not layer.merged
    layer.merge()
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    with torch.no_grad():
        before = layer(x)
    y = layer(x)
    assert y.requires_grad
    y.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = layer(x)
        layer.unmerge()
        close(after, layer(x), 1e-6)
    assert not torch.allclose(after, before)
    layer.merge()
    layer.train()
    assert not layer.merged


CHECKS = {name: globals()[name] for name in FAULTS}


@pytest.fixture(autouse=True)
def repeatable():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_as_it_is_passes(check):
    with package() as planted:
        CHECKS[check](planted)
        assert Path(planted.layers.__file__).parent == PACKAGE
    assert not any(name.startswith("planted") for name in sys.modules)


@pytest.mark.parametrize(
    "check, fault",
    [pytest.param(check, fault, id=f"{check}-{fault.what}") for check, faults in FAULTS.items() for fault in faults],
)
def test_a_planted_fault_is_found(check, fault):
    with package(fault) as planted:
        with pytest.raises(AssertionError):
            CHECKS[check](planted)
