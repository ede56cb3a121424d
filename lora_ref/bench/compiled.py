"""Steps of a whole Llama, eager and under torch.compile: rows for the benchmark `compile` of lora_ref.bench.

The contenders are `model_bench`'s, on the same shapes; what is compiled is the model, as torch.compile(model) does it.
Needs transformers, a C++ compiler (CPU) or triton (CUDA), and peft to compare with.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from ..measure import paired, quartiles
from ..model import count_parameters
from . import layer as layer_bench
from .model import Llama, batch, contenders, peak, step

BACKEND = "inductor"  # torch.compile's default


def no_compiler(device: str) -> str | None:
    """Why torch.compile cannot build code for a device, in words; None where it can. Builds a sine: takes seconds."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # of dynamo, inductor, triton or the compiler itself
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        reason = lines[0] if lines else type(error).__name__
        needed = "g++, or another named in CXX" if device == "cpu" else "triton (pip install triton) and a C compiler"
        return f"torch.compile cannot build code for {device} here ({reason}); it needs {needed}"
    return None


def first(run: Callable[[], None]) -> tuple[float, int]:
    """The seconds of a compiled step's first call, compilation included, and the graphs it made."""
    counted = torch._dynamo.utils.counters["stats"]
    before, start = counted["unique_graphs"], time.perf_counter()
    run()
    if layer_bench.DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, counted["unique_graphs"] - before


def rows(case: Llama, rounds: int) -> Iterator[dict]:
    """A fine-tuning step of a whole Llama (forward, backward, AdamW), eager and compiled, in ms.

        ratio = compiled / eager, round by round;   eager ÷peft, compiled ÷peft: over peft's step of the same kind

    LoRA on all linear layers, float32. torch.compile(model) as it is by default; AdamW stays eager. All contenders,
    eager and compiled, take turns. compile s: the first compiled step, which no other time contains; shorter where
    Inductor's cache on disk has the graph. graphs: 1 where nothing broke it. MiB: the peak of a step, with weights and
    AdamW's state.
    """
    torch.compiler.reset()  # dynamo compiles one function a few times only, and then runs it eagerly
    models, ids, kinds = contenders(case), batch(case), ("eager", "compiled")
    runs = {f"{name}, eager": step(model, ids) for name, model in models.items()}
    runs |= {f"{name}, compiled": step(torch.compile(model, backend=BACKEND), ids) for name, model in models.items()}
    made = {name: first(runs[f"{name}, compiled"]) for name in models}
    seconds = {key: one.seconds for key, one in paired(runs, rounds).items()}

    def over(one: str, other: str) -> dict:
        return quartiles([a / b for a, b in zip(seconds[one], seconds[other])])

    for name, model in models.items():
        own = {kind: f"{name}, {kind}" for kind in kinds}
        row = {"model": case.name, "tokens": ids.numel(), "dropout": case.p, "contender": name}
        row |= {f"{kind}_ms": 1e3 * statistics.median(seconds[key]) for kind, key in own.items()}
        row["ratio"] = over(own["compiled"], own["eager"])
        for kind, key in own.items():
            row[f"{kind}_÷peft"] = over(key, f"peft, {kind}")["median"] if "peft" in models else None
        row["compile_s"], row["graphs"] = made[name]
        row |= {f"{kind}_MiB": peak(model, runs[key]) / 2**20 for kind, key in own.items()}
        size = count_parameters(models["full"]).total
        yield row | {"size": size, "seconds": {key: seconds[key] for key in own.values()}}


def finding(rows: list[dict]) -> str:
    last = [row for row in rows if row["contender"] == "lora_ref"][-1]
    peft = f", and {last['compiled_÷peft']:.2f}× compiled peft's" if last["compiled_÷peft"] else ""
    times = f"{last['ratio']['median']:.2f}× its eager time{peft}"
    return f"At {last['model']} parameters a compiled lora_ref step takes {times}"
