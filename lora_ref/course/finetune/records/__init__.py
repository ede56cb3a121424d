"""Records of fine-tuning runs: what was run, on what, what came out; one JSON file each, checked field by field.

    record = load_record("cpu-mini")                 # that ships with the package; or the path of a file
    write_record(record, "out/record.json")          # checked first, written beside, renamed into place

SCHEMA is the list of all fields, each with its kind, unit, range and meaning; `describe()` prints it. A record says
whether it came from a CPU or a GPU, and which: a CPU's has no driver, and so no number in it can pass for a GPU's.

A record ships as <its profile>.json in this directory: run from committed code, at least three seeds, the best rate
not at the edge of those tried; tests/course/test_shipped_records.py says so, and what a GPU's must show besides.
"""

import difflib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...._files import write_json

FORMAT = "lora_ref.finetune/1"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Field:
    """A value: its kind ("text", "integer", "number", "boolean", "map"), unit, range, choices and meaning.

    `none` says that it may be null: what could not be read, or does not apply.
    """

    kind: str
    meaning: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    none: bool = False


@dataclass(frozen=True)
class Many:
    """A list of `least` items or more, each of this shape: a Field, or a dict of fields."""

    item: object
    least: int = 0


def number(meaning: str, unit: str, low: float | None = 0, high: float | None = None, none: bool = False) -> Field:
    return Field("number", meaning, unit, low, high, none=none)


def integer(meaning: str, unit: str, low: int = 0, none: bool = False) -> Field:
    return Field("integer", meaning, unit, low, none=none)


def text(meaning: str, choices: tuple = (), none: bool = False) -> Field:
    return Field("text", meaning, choices=choices, none=none)


METRICS = {
    "loss": number("cross-entropy on the test examples", "nats a token, or nats an example"),
    "bleu": number("corpus BLEU, all references", "0 to 100", 0, 100, none=True),
    "slot_errors": number("slots left out or said wrongly", "errors a slot", none=True),
    "accuracy": number("share of right labels", "", 0, 1, none=True),
    "f1": number("F1 of label 1, where there are two", "", 0, 1, none=True),
}
SAMPLE = {
    "input": text("what the model read"),
    "reference": text("what a person or the grammar answered"),
    "before": text("the untrained model's answer"),
    "after": text("the trained model's answer"),
}
RUN = {
    "arm": text("full, or the rank: r=8"),
    "adapter": Field("map", "LoRAConfig's fields; null for full fine-tuning", none=True),
    "seed": integer("of the adapter's start, the batches and the dropout", ""),
    "rate": number("peak learning rate", "", 1e-12),
    "chosen": Field("boolean", "whether the rate is the arm's best on validation examples"),
    "together": integer(
        "adapters that trained at once: tokens_per_s, step_ms, peak_bytes, energy_joules and seconds are those of all",
        "adapters",
        1,
    ),
    "parameters_trained": integer("numbers that are trained", "numbers", 1),
    "parameters": integer("numbers of the model, the adapter included", "numbers", 1),
    "tokens": integer("tokens trained on, padding excluded", "tokens", 1),
    "tokens_per_s": number("tokens over the seconds of all steps, evaluations excluded", "tokens/s", 1e-9),
    "step_ms": {name: number(f"of a step's time: {name}", "ms", 1e-9) for name in ("q1", "median", "q3")},
    "peak_bytes": {
        "total": integer("peak of the step with the largest batch, in one process", "bytes", none=True),
        "weights": integer("weights and buffers", "bytes", none=True),
        "gradients": integer("gradients", "bytes", none=True),
        "optimizer": integer("optimizer's state", "bytes", none=True),
        "activations": integer("the peak's rest: activations and scratch tensors", "bytes", none=True),
    },
    "energy_joules": number("taken by the device while training; null where it cannot be read", "J", none=True),
    "losses": Many(number("training loss of every step", "nats a token, or nats an example", None), 1),
    "curve": Many({"step": integer("steps done", "steps"), "loss": number("validation loss", "nats", None)}, 1),
    "validation": number("validation loss at the end", "nats a token, or nats an example"),
    "before": METRICS,
    "after": METRICS,
    "samples": Many(SAMPLE),
    "seconds": number("training and evaluation", "s"),
    "adapter_directory": text("the adapter's place in the run's directory; null for full fine-tuning", none=True),
}
DIVERGED = {
    "arm": RUN["arm"],
    "seed": RUN["seed"],
    "rate": RUN["rate"],
    "reason": text("what the loss became, and when"),
}
ENVIRONMENT = {
    "device": text("what trained", ("cpu", "cuda", "mps", "xpu")),
    "device_name": text("the processor's or the GPU's name"),
    "driver": text("the GPU driver's version; null on a CPU", none=True),
    "cuda": text("the CUDA version that torch was built for; null on a CPU", none=True),
    "processes": integer("processes that trained together", "", 1),
    "threads": integer("CPU threads of each", "", 1),
    "load": number("processes waiting for a core before the start: above 0, cores were busy", "", none=True),
    "platform": text("operating system and machine"),
    "python": text("version"),
    "libraries": Field("map", "versions, by name"),
    "git": text("revision of the source; null outside a repository", none=True),
}
SCHEMA = {
    "format": text("this format", (FORMAT,)),
    "created_utc": text("when the run ended, ISO 8601"),
    "profile": text("name of the profile"),
    "settings": Field("map", "all fields of the profile, as they were"),
    "environment": ENVIRONMENT,
    "model": text("name or directory"),
    "data": text("name or directory"),
    "examples": {part: integer(f"examples for {part}", "", 1) for part in ("train", "validation", "test")},
    "slot_rule": text("how slots are looked for in a text", ("grammar", "verbatim"), none=True),
    "base_bits_per_byte": number("held-out, of a base that was pretrained here", "bits a byte", none=True),
    "runs": Many(RUN, 1),
    "diverged": Many(DIVERGED),
    "seconds": number("wall time of all, interruptions excluded", "s"),
}


def check_record(record: dict) -> dict:
    """Refuse what is no whole record; return it.

    Errors: ValueError with all faults, each with the field's path: fields that are missing or unknown (with near
    matches), values of another kind or out of range, and fields that contradict each other,
    such as a CPU's record with a GPU's driver.
    """
    faults = list(_faults(record, SCHEMA, "")) or list(_contradictions(record))
    if faults:
        raise ValueError(f"no valid record, {len(faults)} fault(s): " + "; ".join(faults))
    return record


def load_record(source: str | os.PathLike) -> dict:
    """A record by the name of one that ships, or by path. Errors: FileNotFoundError; ValueError as check_record's."""
    path = HERE / f"{source}.json" if str(source) in shipped() else Path(source)
    if not path.is_file():
        names = ", ".join(shipped()) or "none"
        raise FileNotFoundError(f"{source} is no file, nor a record that ships (there are: {names})")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it was cut short, or is no record") from None
    try:
        return check_record(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def shipped() -> list[str]:
    """The names of the records that ship."""
    return sorted(path.stem for path in HERE.glob("*.json"))


def write_record(record: dict, path: str | os.PathLike) -> None:
    """Check the record and write it; whatever happens, what was there stays whole until the new one is."""
    write_json(check_record(record), path)


def describe() -> str:
    """All fields, one a line: path, kind, unit, meaning."""
    return "\n".join(_lines(SCHEMA, ""))


def _contradictions(record: dict) -> Iterator[str]:
    """What no single field shows: fields that do not go together."""
    environment = record["environment"]
    gpu = environment["device"] == "cuda"
    for name in ("driver", "cuda"):
        if gpu != (environment[name] is not None):
            yield f"environment.{name} is {environment[name]!r}, but the device is {environment['device']}"
    if gpu and "+cpu" in str(environment["libraries"].get("torch")):
        yield "environment.device is cuda, but torch was built for the CPU alone"
    for i, run in enumerate(record["runs"]):
        for name in ("adapter", "adapter_directory"):
            if (run["arm"] == "full") != (run[name] is None):
                yield f"runs[{i}].{name} is {run[name]!r:.40}, but the arm is {run['arm']}"
        total, *parts = run["peak_bytes"].values()
        if (None in parts) != (total is None) or (total is not None and None not in parts and total != sum(parts)):
            yield f"runs[{i}].peak_bytes.total is {total}, but its parts are {parts}"


def _lines(shape, path: str) -> Iterator[str]:
    if isinstance(shape, dict):
        for name, part in shape.items():
            yield from _lines(part, f"{path}.{name}" if path else name)
    elif isinstance(shape, Many):
        yield from _lines(shape.item, f"{path}[]")
    else:
        kind = shape.kind + (" or null" if shape.none else "")
        yield f"{path:<40}{kind:<18}{shape.unit:<36}{shape.meaning}".rstrip()


def _faults(value, shape, path: str) -> Iterator[str]:
    """What is wrong with a value of this shape, in words."""
    where = path or "the record"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where} must be an object, got {value!r:.40}"
            return
        for name in shape:
            if name not in value:
                yield f"{f'{path}.{name}'.lstrip('.')} is missing"
            else:
                yield from _faults(value[name], shape[name], f"{path}.{name}".lstrip("."))
        for name in value:
            if name not in shape:
                near = difflib.get_close_matches(str(name), [n for n in shape if n not in value], n=1)
                yield f"{f'{path}.{name}'.lstrip('.')} is unknown" + (f" (is it {near[0]}?)" if near else "")
    elif isinstance(shape, Many):
        if not isinstance(value, list) or len(value) < shape.least:
            yield f"{where} must be a list of {shape.least} or more, got {value!r:.40}"
            return
        for i, item in enumerate(value):
            yield from _faults(item, shape.item, f"{path}[{i}]")
    else:
        yield from _field_faults(value, shape, where)


def _field_faults(value, field: Field, where: str) -> Iterator[str]:
    if value is None and field.none:
        return
    kinds = {"text": str, "integer": int, "number": (int, float), "boolean": bool, "map": dict}
    if not isinstance(value, kinds[field.kind]) or (isinstance(value, bool) and field.kind != "boolean"):
        yield f"{where} must be {field.kind}, got {value!r:.40}"
    elif field.choices and value not in field.choices:
        yield f"{where} must be one of {', '.join(field.choices)}, got {value!r:.40}"
    elif field.kind in ("integer", "number"):
        low, high = field.low, field.high
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            bounds = f"{'any' if low is None else f'at least {low:g}'}" + (
                "" if high is None else f", at most {high:g}"
            )
            unit = f" {field.unit}" if field.unit else ""
            yield f"{where} = {value!r} is out of range: {bounds}{unit}, finite"
