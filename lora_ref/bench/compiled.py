"""Steps of a whole Llama, eager and under torch.compile: rows for the benchmark `compile` of lora_ref.bench.

The contenders are those of `model`, on the same shapes; what is compiled is the model, as torch.compile(model) does it.
Needs transformers, a C++ compiler (CPU) or triton (CUDA), and peft to compare with.
"""

import time
from collections.abc import Callable, Iterator

import torch

from ..measure import paired
from ..model import count_parameters
from . import model as model_bench
from .model import Llama, contenders, peak, step, token_ids
from .ratios import median_ratio, ratio

BACKEND = "inductor"  # torch.compile's default
KINDS = ("eager", "compiled")


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


def first_call(run: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """The seconds of a compiled step's first call, compilation included, and how many graphs it made."""
    counted = torch._dynamo.utils.counters["stats"]
    before, start = counted["unique_graphs"], time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, counted["unique_graphs"] - before


def work(case: Llama, rounds: int) -> float:
    """About how many multiply-adds a case takes, compilation left out: each model eager and compiled."""
    return 2 * model_bench.work(case, rounds)


def measure_compiled(case: Llama, rounds: int, device: torch.device) -> Iterator[dict]:
    """A fine-tuning step of a whole Llama (forward, backward, AdamW), eager and compiled, in ms.

        ratio = compiled / eager, round by round;   eager ÷peft, compiled ÷peft: over peft's step of the same kind

    LoRA on all linear layers, float32. torch.compile(model) as it is by default; AdamW stays eager. All contenders,
    eager and compiled, take turns. compile s: the first compiled step, which no other time contains; shorter where
    Inductor's cache on disk has the graph. graphs: 1 where nothing broke it. MiB: the peak of a step, with weights and
    AdamW's state.
    """
    torch.compiler.reset()  # dynamo compiles one function a few times only, and then runs it eagerly
    models, ids = contenders(case, device), token_ids(case, device)
    runs = {f"{name}, eager": step(model, ids) for name, model in models.items()}
    runs |= {f"{name}, compiled": step(torch.compile(model, backend=BACKEND), ids) for name, model in models.items()}
    first_calls = {name: first_call(runs[f"{name}, compiled"], device) for name in models}
    timing = paired(runs, rounds)
    size = count_parameters(models["full"]).total
    for name, model in models.items():
        row = {"model": case.name, "tokens": ids.numel(), "dropout": case.p, "contender": name}
        for kind in KINDS:
            row[f"{kind}_ms"] = timing[f"{name}, {kind}"].ms
        row["ratio"] = ratio(timing, f"{name}, compiled", f"{name}, eager")
        for kind in KINDS:
            row[f"{kind}_÷peft"] = median_ratio(timing, f"{name}, {kind}", f"peft, {kind}")
        row["compile_s"], row["graphs"] = first_calls[name]
        for kind in KINDS:
            row[f"{kind}_MiB"] = peak(model, runs[f"{name}, {kind}"], device) / 2**20
        own = {key: timing[key].seconds for key in (f"{name}, {kind}" for kind in KINDS)}
        yield row | {"size": size, "seconds": own}


def summarize_compiled(rows: list[dict]) -> str:
    own = [row for row in rows if row["contender"] == "lora_ref"]
    if not own:
        return "No compiled lora_ref step was timed"
    last = own[-1]
    peft = f", and {last['compiled_÷peft']:.2f}× compiled peft's" if last["compiled_÷peft"] else ""
    times = f"{last['ratio']['median']:.2f}× its eager time{peft}"
    return f"At {last['model']} parameters a compiled lora_ref step takes {times}"
