"""One LoRA layer against the others: rows for the benchmarks `layer` and `layer_memory` of lora_ref.bench.

The contenders carry the same weights and take the same x (N, k), which wants its gradient, and ∂L/∂y (N, d):

    frozen         F.linear, W0 frozen: what any adapter costs at least
    lora_ref       LoRALinear
    peft           peft's LoRA layer as get_peft_model makes it (on a bf16 base: float32 factors)
    loralib        loralib.Linear, where installed
    parametrised   torch.nn.utils.parametrize with W0 + s·B·A as the weight, as minLoRA does
    full           F.linear, W0 trained

On a bf16 base lora_ref's factors are float32 as well, loralib's and the parametrised ones bf16.
"""

import copy
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..functional import CPU_UPCAST_MAX_NUMEL
from ..layers import LoRALinear
from ..measure import paired, peak_bytes, quartiles, saved_bytes

DEVICE = torch.device("cpu")  # what bench's --device sets


class Layer(NamedTuple):
    """A case: W0 is d×k, x has N rows, B·A rank r and α = 2r; dropout p, dtype."""

    d: int
    k: int
    N: int
    r: int
    p: float = 0.0
    dtype: torch.dtype = torch.float32

    def row(self) -> dict:
        return {"d": self.d, "k": self.k, "N": self.N, "r": self.r, "p": self.p, "dtype": str(self.dtype)[6:]}


class Net(nn.Module):
    """A module of one layer, for peft to adapt."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


class Update(nn.Module):
    """W0 ↦ W0 + s·B·A, as a parametrisation of a weight."""

    def __init__(self, A: Tensor, B: Tensor, s: float):
        super().__init__()
        self.A, self.B, self.s = nn.Parameter(A), nn.Parameter(B), s

    def forward(self, W0: Tensor) -> Tensor:
        return W0 + self.s * (self.B @ self.A)


def contenders(case: Layer) -> dict[str, nn.Module]:
    """The layers of the head of this module, by name; those whose library is missing are left out."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(case.k, case.d).to(DEVICE, case.dtype).requires_grad_(False)
    config = LoRAConfig(r=case.r, lora_alpha=2 * case.r, lora_dropout=case.p)
    A = (torch.randn(case.r, case.k, generator=generator) / case.k**0.5).to(DEVICE)
    B = (torch.randn(case.d, case.r, generator=generator) / case.r**0.5).to(DEVICE)
    layers = {"frozen": base, "lora_ref": LoRALinear(copy.deepcopy(base), config).to(DEVICE)}
    pairs = {"lora_ref": (layers["lora_ref"].lora_A, layers["lora_ref"].lora_B)}
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=case.r, lora_alpha=2 * case.r, lora_dropout=case.p, target_modules=["layer"])
        layers["peft"] = get_peft_model(Net(copy.deepcopy(base)), settings).base_model.model.layer.to(DEVICE)
        pairs["peft"] = (layers["peft"].lora_A["default"].weight, layers["peft"].lora_B["default"].weight)
    if importlib.util.find_spec("loralib"):
        import loralib

        layer = loralib.Linear(case.k, case.d, r=case.r, lora_alpha=2 * case.r, lora_dropout=case.p)
        layer.load_state_dict(base.state_dict(), strict=False)
        layers["loralib"] = layer.to(DEVICE, case.dtype)
        layer.bias.requires_grad_(False)
        pairs["loralib"] = (layer.lora_A, layer.lora_B)
    with torch.no_grad():
        for own_A, own_B in pairs.values():
            own_A.copy_(A)
            own_B.copy_(B)
    if case.p == 0:  # a weight has no x to drop
        layers["parametrised"] = copy.deepcopy(base)
        update = Update(A.to(case.dtype), B.to(case.dtype), config.scale)
        nn.utils.parametrize.register_parametrization(layers["parametrised"], "weight", update)
    layers["full"] = copy.deepcopy(base).requires_grad_(True)
    return layers


def tensors(case: Layer) -> tuple[Tensor, Tensor]:
    """x (N, k), which wants its gradient, and ∂L/∂y (N, d)."""
    x, gradient = (torch.randn(case.N, n, device=DEVICE).to(case.dtype) for n in (case.k, case.d))
    return x.requires_grad_(), gradient


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """A function that forgets the gradients and runs the layer forward and backward once."""
    parameters = list(layer.parameters())

    def run() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        y = layer(x)  # held until the end, as a network's next layer would
        y.backward(gradient)

    return run


def formula(case: Layer) -> float:
    """A LoRA step's multiply-adds over a full one's: 2/3 + r(d+k)/(dk). Source: 4Ndk + 6Nr(d+k) over 6Ndk."""
    return 2 / 3 + case.r * (case.d + case.k) / (case.d * case.k)


def layer_rows(case: Layer, rounds: int) -> Iterator[dict]:
    """A step of one layer: forward and backward of W0·x + b + s·B·A·D(x), in ms and as shares of peft's time.

        ratio = lora_ref / peft;   floor = frozen / peft, which no adapter can beat;
        bound = floor · (1 + 3r(d+k)/(2dk)): the frozen layer's time grown by the adapter's multiply-adds. Where it is
        above 0.90 peft spends nearly all of its time on products that every order of them needs;
        model = 2/3 + r(d+k)/(dk), the multiply-adds of LoRA over full fine-tuning's; beside it lora_ref / full

    d×k weight, N rows, rank r, dropout p. Small steps are timed as many at a time.
    """
    x, gradient = tensors(case)
    once = {name: step(layer, x, gradient) for name, layer in contenders(case).items()}
    many = max(1, round(2e8 / (case.N * case.d * case.k)))

    def repeated(run: Callable[[], None]) -> Callable[[], None]:
        return lambda: [run() for _ in range(many)] and None

    timing = paired({name: repeated(run) for name, run in once.items()}, rounds)

    def over(name: str, other: str) -> dict | None:
        if name not in timing or other not in timing:
            return None
        return quartiles([a / b for a, b in zip(timing[name].seconds, timing[other].seconds)])

    row = case.row() | {f"{name}_ms": timing[name].ms / many for name in ("lora_ref", "peft") if name in timing}
    row["ratio"] = over("lora_ref", "peft")
    for title, pair in {
        "floor": ("frozen", "peft"),
        "bound": ("frozen", "peft"),
        "loralib": ("loralib", "peft"),
        "parametrised": ("parametrised", "peft"),
        "full": ("full", "peft"),
        "÷full": ("lora_ref", "full"),
    }.items():
        row[title] = None if over(*pair) is None else over(*pair)["median"]
    if row["floor"] is not None:
        row["bound"] = row["floor"] * (1 + 3 * case.r * (case.d + case.k) / (2 * case.d * case.k))
    row |= {"model": formula(case), "size": case.N * case.d * case.k}
    yield row | {"seconds": {name: [t / many for t in one.seconds] for name, one in timing.items()}}


def memory_rows(case: Layer, rounds: int) -> Iterator[dict]:
    """The peak of a step's memory beyond x, ∂L/∂y and the weights, as a multiple of the frozen layer's (which holds y
    and ∂L/∂x); and what autograd saves beyond x and the weights, in units of N·r numbers.

        expected for lora_ref: peak 1 + 2r/(d+k), from H and Z; saved 1, with dropout N·k bytes of mask more
    """
    x, gradient = tensors(case)
    peaks, saved = {}, {}
    for name, layer in contenders(case).items():
        run = step(layer, x, gradient)
        run()
        x.grad = None
        layer.zero_grad()
        peaks[name] = peak_bytes(run, DEVICE)
        saved[name] = saved_bytes(lambda layer=layer: layer(x), [x, *layer.parameters()]) / (
            case.N * case.r * x.itemsize
        )
    row = case.row() | {"frozen_MiB": peaks["frozen"] / 2**20}
    names = ("lora_ref", "peft", "loralib", "parametrised", "full")
    row |= {f"{name}": peaks[name] / peaks["frozen"] if name in peaks else None for name in names}
    row |= {"1+2r/(d+k)": 1 + 2 * case.r / (case.d + case.k)}
    row |= {f"saved_{name}": saved.get(name) for name in names[:4]}
    yield row | {"size": case.N * case.d * case.k, "seconds": {}}


def layer_finding(rows: list[dict]) -> str:
    ratios = [row["ratio"]["median"] for row in rows if row["ratio"] and large(row)]
    if not ratios:
        return "No step with d, k ≥ 256 and N ≥ 512 was timed against peft"
    below = sum(ratio <= 0.9 for ratio in ratios)
    bounded = sum(row["ratio"]["median"] > 0.9 and row["bound"] > 0.85 for row in rows if row["ratio"] and large(row))
    return (
        f"A lora_ref step takes {statistics.median(ratios):.2f}× peft's time (median of {len(ratios)} cases "
        f"with d, k ≥ 256 and N ≥ 512; {below} of them ≤ 0.90×, and {bounded} of the others have a bound above 0.85)"
    )


def memory_finding(rows: list[dict]) -> str:
    cast_up = {
        id(row)
        for row in rows
        if row["dtype"] != "float32" and row["N"] * max(row["d"], row["k"]) <= CPU_UPCAST_MAX_NUMEL
    }
    whole = [row for row in rows if row["p"] == 0 and id(row) not in cast_up]
    worst = max(row["lora_ref"] / row["1+2r/(d+k)"] for row in whole)
    within = sum(row["lora_ref"] <= 1.05 for row in whole)
    return (
        f"Without dropout lora_ref's peak is ≤ 1.05× the frozen layer's in {within} of {len(whole)} cases, at most "
        f"{worst:.2f}× what the frozen layer, H and Z need (16-bit cases of at most {CPU_UPCAST_MAX_NUMEL:,} numbers, cast up, left out)"
    )


def large(row: dict) -> bool:
    return row["d"] >= 256 and row["k"] >= 256 and row["N"] >= 512


def draw(axes, rows: list[dict]) -> None:
    """lora_ref / full as measured against 2/3 + r(d+k)/(dk), one marker for each dtype and dropout."""
    groups = itertools.groupby(
        sorted(rows, key=lambda row: (row["dtype"], row["p"])), lambda row: (row["dtype"], row["p"])
    )
    for (key, group), marker in zip(groups, itertools.cycle("os^D")):
        group = list(group)
        axes.plot(
            [row["model"] for row in group],
            [row["÷full"] for row in group],
            marker,
            label=f"{key[0]}, dropout {key[1]}",
        )
    ends = [min(row["model"] for row in rows), max(row["model"] for row in rows)]
    axes.plot(ends, ends, "k-", linewidth=1, label="equal")
    axes.set(
        xlabel="2/3 + r(d+k)/(dk): multiply-adds, LoRA / full",
        ylabel="time of a step, lora_ref / full",
        xscale="log",
        yscale="log",
    )


def draw_memory(axes, rows: list[dict]) -> None:
    """Peak memory of a step over the frozen layer's, lora_ref and peft, in the order of the table."""
    for name, marker in (("lora_ref", "o"), ("peft", "s"), ("parametrised", "^")):
        points = [(i, row[name]) for i, row in enumerate(rows) if row[name]]
        axes.plot(*zip(*points), marker, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xlabel="case, in the order of the table", ylabel="peak memory of a step / frozen layer's", yscale="log")


def grid() -> list[Layer]:
    """Every shape with both dtypes, without and with dropout."""
    shapes = [
        (256, 384, 512, 8),
        (128, 256, 64, 4),
        (128, 128, 512, 64),
        (256, 256, 8192, 16),
        (1024, 768, 512, 8),
        (768, 3072, 512, 16),
        (1024, 1024, 2048, 1),
        (1024, 1024, 2048, 64),
        (4096, 1024, 512, 8),
    ]
    large = [
        (4096, 128, 64, 1),
        (512, 512, 8192, 32),
        (1024, 1024, 8192, 16),
        (2048, 2048, 2048, 16),
        (4096, 4096, 512, 64),
    ]
    kinds = list(itertools.product((torch.float32, torch.bfloat16), (0.0, 0.1)))
    return [Layer(*shape, p, dtype) for shapes in (shapes, large) for shape in shapes for dtype, p in kinds]


LAYERS = grid()
PLAIN = 36  # of them in a run that is neither --quick nor --full
