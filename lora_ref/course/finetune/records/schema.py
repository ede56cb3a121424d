"""What a record is: each field declared once, with its type, range, unit and meaning.

Record.model_validate(record)     # pydantic checks it
Record.model_json_schema()        # the same declaration as JSON schema
leaves()                          # one `Leaf` for every value, for `describe` and for error messages
"""

import types
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

FORMAT = "lora_ref.finetune/2"
LOSS_UNIT = "nats a token, or nats an example"


class _Part(BaseModel):
    """An object of a record: no unknown field, no NaN or infinity, and an integer is no boolean."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _field(meaning: str, unit: str = "", **constraints):
    return Field(description=meaning, json_schema_extra={"unit": unit}, **constraints)


class Metrics(_Part):
    """How good a model is on the test examples; null where a measure does not apply."""

    loss: float = _field("cross-entropy on the test examples", LOSS_UNIT, ge=0)
    bleu: float | None = _field("corpus BLEU, all references", "0 to 100", ge=0, le=100)
    slot_errors: float | None = _field("slots left out or named wrongly", "errors a slot", ge=0)
    accuracy: float | None = _field("share of right labels", ge=0, le=1)
    f1: float | None = _field("F1 of label 1, where there are two", ge=0, le=1)


class Sample(_Part):
    """A test example and what the model answered."""

    input: str = _field("what the model read")
    reference: str = _field("what a person or the grammar answered")
    before: str = _field("the untrained model's answer")
    after: str = _field("the trained model's answer")


class StepTime(_Part):
    """Quartiles of a step's time."""

    q1: float = _field("of a step's time: q1", "ms", ge=1e-9)
    median: float = _field("of a step's time: median", "ms", ge=1e-9)
    q3: float = _field("of a step's time: q3", "ms", ge=1e-9)


class PeakBytes(_Part):
    """Memory at its peak, and its parts; all null where it was not measured."""

    total: int | None = _field("peak of the step with the largest batch, in one process", "bytes", ge=0)
    weights: int | None = _field("weights and buffers", "bytes", ge=0)
    gradients: int | None = _field("gradients", "bytes", ge=0)
    optimizer: int | None = _field("optimizer's state", "bytes", ge=0)
    activations: int | None = _field("the peak's rest: activations and scratch tensors", "bytes", ge=0)


class Evaluation(_Part):
    """A point of the validation curve."""

    step: int = _field("steps done", "steps", ge=0)
    loss: float = _field("validation loss", "nats", ge=0)


class Run(_Part):
    """One training: its settings, what it took, what came out."""

    arm: str = _field("full, or the rank: r=8")
    adapter: dict | None = _field("LoRAConfig's fields; null for full fine-tuning")
    seed: int = _field("of the adapter's initial values, the batches and the dropout", ge=0)
    lr: float = _field("peak learning rate", ge=1e-12)
    chosen: bool = _field("whether the learning rate is the arm's best on validation examples")
    parallel_adapters: int = _field(
        "adapters that trained at once: tokens_per_s, step_ms, peak_bytes, energy_joules and seconds are those of all",
        "adapters",
        ge=1,
    )
    parameters_trained: int = _field("numbers that are trained", "numbers", ge=1)
    parameters: int = _field("numbers of the model, the adapter included", "numbers", ge=1)
    tokens: int = _field("tokens trained on, padding excluded", "tokens", ge=1)
    tokens_per_s: float = _field("tokens over the seconds of all steps, evaluations excluded", "tokens/s", ge=1e-9)
    step_ms: StepTime
    peak_bytes: PeakBytes
    energy_joules: float | None = _field("taken by the device while training; null if it cannot be read", "J", ge=0)
    losses: list[float] = _field("training loss of every step", LOSS_UNIT, min_length=1)
    curve: list[Evaluation] = Field(min_length=1)
    validation: float = _field("validation loss at the end", LOSS_UNIT, ge=0)
    before: Metrics
    after: Metrics
    samples: list[Sample]
    seconds: float = _field("training and evaluation", "s", ge=0)
    adapter_directory: str | None = _field("the adapter's place in the run's directory; null for full fine-tuning")


class DivergedRun(_Part):
    """A training whose loss was not finite."""

    arm: str = _field("full, or the rank: r=8")
    seed: int = _field("of the adapter's initial values, the batches and the dropout", ge=0)
    lr: float = _field("peak learning rate", ge=1e-12)
    reason: str = _field("what the loss became, and when")


class Environment(_Part):
    """The machine: lora_ref.environment.environment."""

    device: Literal["cpu", "cuda", "mps", "xpu"] = _field("what trained")
    device_name: str = _field("the processor's or the GPU's name")
    driver: str | None = _field("the GPU driver's version; null on a CPU")
    cuda: str | None = _field("the CUDA version that torch was built for; null on a CPU")
    processes: int = _field("processes that trained together", ge=1)
    threads: int = _field("CPU threads of each", ge=1)
    cores: int | None = _field("CPU cores; not in records of format 1", ge=1, default=None)
    cpu_capability: str | None = _field("CPU's vector instructions; not in records of format 1", default=None)
    load: float | None = _field("processes waiting for a core before the start: above 0, cores were busy", ge=0)
    platform: str = _field("operating system and machine")
    python: str = _field("version")
    libraries: dict = _field("versions, by name")
    git: str | None = _field("revision of the source; null outside a repository")


class Examples(_Part):
    """How many examples each part of the data has."""

    train: int = _field("examples for train", ge=1)
    validation: int = _field("examples for validation", ge=1)
    test: int = _field("examples for test", ge=1)


class Record(_Part):
    """A fine-tuning experiment: what was run, on what, and what came out."""

    format: Literal["lora_ref.finetune/2"] = _field("this format")
    created_utc: str = _field("when the run ended, ISO 8601")
    profile: str = _field("name of the profile")
    settings: dict = _field("all settings of the profile, in its groups, as they were")
    environment: Environment
    model: str = _field("name or directory")
    data: str = _field("name or directory")
    examples: Examples
    slot_rule: Literal["grammar", "verbatim"] | None = _field("how slots are looked for in a text")
    base_bits_per_byte: float | None = _field("held-out, of a base that was pretrained here", "bits a byte", ge=0)
    runs: list[Run] = Field(min_length=1)
    diverged: list[DivergedRun]
    seconds: float = _field("wall time of all, interruptions excluded", "s", ge=0)

    @model_validator(mode="after")
    def _check_fields_that_belong_together(self) -> Self:
        if found := [*_gpu_contradictions(self.environment), *_run_contradictions(self.runs)]:
            raise ValueError("\n".join(found))
        return self


def _gpu_contradictions(environment: Environment) -> Iterator[str]:
    is_gpu = environment.device == "cuda"
    for name in ("driver", "cuda"):
        value = getattr(environment, name)
        if is_gpu != (value is not None):
            yield f"environment.{name} is {value!r}, but the device is {environment.device}"
    if is_gpu and "+cpu" in str(environment.libraries.get("torch")):
        yield "environment.device is cuda, but torch was built for the CPU alone"


def _run_contradictions(runs: list[Run]) -> Iterator[str]:
    for i, run in enumerate(runs):
        for name in ("adapter", "adapter_directory"):
            value = getattr(run, name)
            if (run.arm == "full") != (value is None):
                yield f"runs[{i}].{name} is {value!r:.40}, but the arm is {run.arm}"
        total, *parts = run.peak_bytes.model_dump().values()
        if total is None and parts == [None] * len(parts):
            continue
        if total is None or None in parts or total != sum(parts):
            yield f"runs[{i}].peak_bytes.total is {total}, but its parts are {parts}"


class Leaf(NamedTuple):
    """A value of a record, as declared. `path` has [] where any item of a list may stand."""

    path: str
    kind: str
    meaning: str
    unit: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    nullable: bool
    required: bool

    @property
    def range(self) -> str:
        """Such as "at least 0, at most 100 errors a slot, finite"."""
        bounds = "any" if self.low is None else f"at least {self.low:g}"
        bounds += "" if self.high is None else f", at most {self.high:g}"
        return f"{bounds}{f' {self.unit}' if self.unit else ''}, finite"


KINDS = {str: "text", int: "integer", float: "number", bool: "boolean", dict: "map"}


def leaves(model: type[BaseModel] = Record, path: str = "") -> Iterator[Leaf]:
    """Every value of a record in its order; of a list one item."""
    for name, info in model.model_fields.items():
        here = f"{path}.{name}".lstrip(".")
        annotation, nullable = _without_none(info.annotation)
        if get_origin(annotation) is list:
            annotation, here = get_args(annotation)[0], f"{here}[]"
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from leaves(annotation, here)
            continue
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        limits = {type(limit).__name__: limit for limit in info.metadata}
        yield Leaf(
            path=here,
            kind="text" if choices else KINDS[annotation],
            meaning=info.description,
            unit=info.json_schema_extra["unit"],
            low=limits["Ge"].ge if "Ge" in limits else None,
            high=limits["Le"].le if "Le" in limits else None,
            choices=choices,
            nullable=nullable,
            required=info.is_required(),
        )


def _without_none(annotation) -> tuple[object, bool]:
    """(the type without | None, whether it had that)."""
    if get_origin(annotation) is Annotated:
        return _without_none(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    (only,) = [part for part in get_args(annotation) if part is not type(None)]
    return only, True
