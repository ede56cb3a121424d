"""The time of one LoRA layer's step against the others': rows for the benchmark `layer` of lora_ref.bench."""

import itertools
import statistics
from collections.abc import Callable, Iterator

import torch

from ..measure import paired
from .layer_contenders import CONTENDERS, Layer, contenders, inputs, step
from .ratios import median_ratio, ratio

WORK_OF_A_CALL = 2e8  # multiply-adds N·d·k; of a smaller step as many are timed at a time as make this


def expected_ratio(case: Layer) -> float:
    """A LoRA step's multiply-adds over a full one's: 2/3 + r(d+k)/(dk). Source: 4Ndk + 6Nr(d+k) over 6Ndk."""
    return 2 / 3 + case.r * (case.d + case.k) / (case.d * case.k)


def steps_per_call(case: Layer) -> int:
    """How many steps are timed at a time."""
    return max(1, round(WORK_OF_A_CALL / case.size))


def work(case: Layer, rounds: int) -> float:
    """About how many multiply-adds a case takes: two or three products of each contender in each round, warm-up
    included."""
    return 2.5 * CONTENDERS * (rounds + 1) * steps_per_call(case) * case.size


def measure_layer(case: Layer, rounds: int, device: torch.device) -> Iterator[dict]:
    """A step of one layer: forward and backward of W0·x + b + s·B·A·D(x), in ms and as shares of peft's time.

        ratio = lora_ref / peft;   floor = frozen / peft, which no adapter can beat;
        bound = floor · (1 + 3r(d+k)/(2dk)): the frozen layer's time grown by the adapter's multiply-adds. Where it is
        above 0.90 peft spends nearly all of its time on products that every order of them needs;
        model = 2/3 + r(d+k)/(dk), the multiply-adds of LoRA over full fine-tuning's; beside it lora_ref / full

    d×k weight, N rows, rank r, dropout p. Small steps are timed several at a time.
    """
    x, gradient = inputs(case, device)
    count = steps_per_call(case)

    def repeated(run: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(count):
                run()

        return call

    layers = contenders(case, device)
    timing = paired({name: repeated(step(layer, x, gradient)) for name, layer in layers.items()}, rounds)
    row = case.row()
    for name in ("lora_ref", "peft"):
        if name in timing:
            row[f"{name}_ms"] = timing[name].ms / count
    row["ratio"] = ratio(timing, "lora_ref", "peft")
    row["floor"] = floor = median_ratio(timing, "frozen", "peft")
    grown = 1 + 3 * case.r * (case.d + case.k) / (2 * case.d * case.k)
    row["bound"] = None if floor is None else floor * grown
    for name in ("loralib", "parametrised", "full"):
        row[name] = median_ratio(timing, name, "peft")
    row["÷full"] = median_ratio(timing, "lora_ref", "full")
    row |= {"model": expected_ratio(case), "size": case.size}
    yield row | {"seconds": {name: [time / count for time in one.seconds] for name, one in timing.items()}}


def summarize_layer(rows: list[dict]) -> str:
    large = [row for row in rows if row["ratio"] and row["d"] >= 256 and row["k"] >= 256 and row["N"] >= 512]
    if not large:
        return "No step with d, k ≥ 256 and N ≥ 512 was timed against peft"
    ratios = [row["ratio"]["median"] for row in large]
    below = sum(ratio <= 0.9 for ratio in ratios)
    bounded = sum(row["ratio"]["median"] > 0.9 and row["bound"] > 0.85 for row in large)
    return (
        f"A lora_ref step takes {statistics.median(ratios):.2f}× peft's time (median of {len(ratios)} cases "
        f"with d, k ≥ 256 and N ≥ 512; {below} of them ≤ 0.90×, and {bounded} of the others have a bound above 0.85)"
    )


def draw_layer(axes, rows: list[dict]) -> None:
    """lora_ref / full as measured against 2/3 + r(d+k)/(dk), one marker for each dtype and dropout."""
    groups: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["dtype"], row["p"])):
        groups.setdefault(f"{row['dtype']}, dropout {row['p']}", []).append(row)
    for (label, group), marker in zip(groups.items(), itertools.cycle("os^D")):
        axes.plot([row["model"] for row in group], [row["÷full"] for row in group], marker, label=label)
    ends = [min(row["model"] for row in rows), max(row["model"] for row in rows)]
    axes.plot(ends, ends, "k-", linewidth=1, label="equal")
    axes.set(
        xlabel="2/3 + r(d+k)/(dk): multiply-adds, LoRA / full",
        ylabel="time of a step, lora_ref / full",
        xscale="log",
        yscale="log",
    )


def _grid(shapes: list[tuple]) -> list[Layer]:
    """Every shape with both dtypes, without and with dropout."""
    kinds = list(itertools.product((torch.float32, torch.bfloat16), (0.0, 0.1)))
    return [Layer(*shape, p, dtype) for shape in shapes for dtype, p in kinds]


DEFAULT_LAYERS = _grid(
    [
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
)
LARGE_LAYERS = _grid(
    [
        (4096, 128, 64, 1),
        (512, 512, 8192, 32),
        (1024, 1024, 8192, 16),
        (2048, 2048, 2048, 16),
        (4096, 4096, 512, 64),
    ]
)
LAYERS = DEFAULT_LAYERS + LARGE_LAYERS
