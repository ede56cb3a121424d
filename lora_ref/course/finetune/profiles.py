"""The profiles of the fine-tuning command: a table of settings, each of which can be overridden.

    profile("cpu-mini", steps=50)        # a Profile; on the command line: --profile cpu-mini --steps 50

Every field has a range, checked when a profile is made. `model` is the shipped "prose_llama", "new" (made here from
nothing, the `base_…` fields say how), a directory that save_pretrained wrote, or a name on the Hugging Face Hub.
`data` is a grammar of this course ("restaurants", "weather"), a file or a directory of csv, tsv, json or jsonl
files, or a Hub name, NAME[:CONFIGURATION][@REVISION].
"""

import argparse
import difflib
import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path


def setting(default, meaning: str, low: float | None = None, high: float | None = None, choices: tuple = (), unit=""):
    """A field with its default, meaning, range and choices (a list's are those of each of its items)."""
    return field(
        default=default,
        metadata={"meaning": meaning, "low": low, "high": high, "choices": choices, "unit": unit},
    )


@dataclass(frozen=True)
class Profile:
    """All that a run depends on. Errors: ValueError or TypeError with the field, its value and the mend."""

    task: str = setting("data-to-text", "what is learnt", choices=("data-to-text", "classification"))
    model: str = setting("prose_llama", "the base model")
    data: str = setting("restaurants", "the data set")
    train: int = setting(2000, "examples to train on, at most", 1, unit="examples")
    validation: int = setting(100, "examples to choose rates by, at most", 1, unit="examples")
    test: int = setting(100, "examples to judge by, at most", 1, unit="examples")
    length: int = setting(256, "longest example", 2, unit="tokens")
    new_tokens: int = setting(96, "longest text that is written", 1, unit="tokens")
    samples: int = setting(5, "texts that the record shows", 0, unit="texts")

    arms: tuple[str, ...] = setting(("full", "r=8"), "what is compared: full, or a rank such as r=8")
    lora_alpha: float = setting(32.0, "α of the scale α/r", 1e-6)
    target_modules: tuple[str, ...] = setting(("all-linear",), "the adapted layers")
    lora_dropout: float = setting(0.0, "dropout before A", 0, 0.99)
    use_rslora: bool = setting(False, "scale α/√r")

    seeds: tuple[int, ...] = setting((0,), "rates are chosen on the first", 0)
    full_rates: tuple[float, ...] = setting((4e-3,), "peak learning rates of full fine-tuning", 1e-9, 10)
    lora_rates: tuple[float, ...] = setting((8e-3,), "peak learning rates of LoRA", 1e-9, 10)
    together: int = setting(1, "adapters that are trained at once while rates are searched", 1, unit="adapters")
    steps: int = setting(100, "steps of a run", 2, unit="steps")
    batch: int = setting(16, "examples of a step, over all processes and parts", 1, unit="examples")
    accumulate: int = setting(1, "parts that a step is done in, one after the other", 1, unit="parts")
    warmup: float = setting(0.1, "share of the steps in which the rate rises", 0, 0.9)
    weight_decay: float = setting(0.0, "AdamW's", 0, 10)
    clip: float = setting(1.0, "largest norm of the gradient", 1e-9)
    evaluations: int = setting(5, "looks at the validation loss during a run", 1, unit="looks")

    device: str = setting(
        "auto", "where to train; auto takes a GPU if there is one, cuda wants one", choices=("auto", "cpu", "cuda")
    )
    threads: int = setting(0, "CPU threads of a process; 0 leaves the number to torch", 0, unit="threads")
    precision: str = setting("fp32", "of the arithmetic (trained weights stay fp32)", choices=("fp32", "bf16", "fp16"))
    frozen: str = setting("fp32", "type of weights that LoRA freezes", choices=("fp32", "bf16", "fp16"))
    checkpointing: bool = setting(False, "keep no activations inside blocks, compute them twice")

    base_hidden: int = setting(640, "of a new model: width", 8)
    base_layers: int = setting(10, "of a new model: layers", 1)
    base_heads: int = setting(10, "of a new model: heads", 1)
    base_steps: int = setting(2500, "of a new model: pretraining steps", 2, unit="steps")
    base_batch: int = setting(64, "of a new model: windows of a pretraining step", 1, unit="windows")
    base_length: int = setting(256, "of a new model: tokens of a window", 8, 512, unit="tokens")
    base_rate: float = setting(1e-3, "of a new model: peak learning rate", 1e-9, 10)
    base_packages: tuple[str, ...] = setting(("all",), "of a new model: packages whose docstrings it reads")

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        for arm in self.arms:
            if arm != "full" and not re.fullmatch(r"r=[1-9]\d*", arm):
                raise ValueError(f"arms has {arm!r}; an arm is 'full', or a rank such as 'r=8'")
        for name in ("arms", "seeds", "full_rates", "lora_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} = {values!r} has a value twice; name each once")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch = {self.batch} is no multiple of accumulate = {self.accumulate}; parts must be of equal size"
            )
        if self.task == "classification" and self.model in ("prose_llama", "new"):
            raise ValueError(
                f"model = {self.model!r} writes text; task = 'classification' needs a classifier's directory or name"
            )
        if self.together > 1 and self.task == "classification":
            raise ValueError(
                f"together = {self.together}, but each adapter of a classifier trains the head of the model too, which "
                "adapters at once would share; choose together = 1"
            )
        if self.together > 1 and self.precision == "fp16":
            raise ValueError(
                f"together = {self.together}, but fp16 scales all gradients by one number, which adapters at once "
                "would share; choose precision = 'bf16', or together = 1"
            )
        if self.model == "new" and self.base_hidden % (2 * self.base_heads):
            raise ValueError(
                f"base_hidden = {self.base_hidden} is no multiple of 2·base_heads = {2 * self.base_heads}; a head's "
                "width must be even"
            )

    @property
    def warmup_steps(self) -> int:
        return min(self.steps - 1, round(self.warmup * self.steps))


def profile(name: str, **overrides) -> Profile:
    """The named profile with these fields instead of its own.

    Errors: ValueError for an unknown profile or field, with near matches, or values out of range.
    """
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is unknown; {near(str(name), PROFILES)}")
    known = [f.name for f in fields(Profile)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"a profile has no field {key!r}; {near(key, known)}")
    return replace(PROFILES[name], **overrides)


def near(name: str, known) -> str:
    """A hint for a misspelt name."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(map(repr, found))}?" if found else f"there are {', '.join(known)}"


def parse(name: str, words: list[str]) -> object:
    """The value of a field as the command line gives it. Errors: ValueError with the field."""
    item, several = _kind(next(f for f in fields(Profile) if f.name == name))
    if not several and len(words) != 1:
        raise ValueError(f"{name} takes one value, got {' '.join(words)}")
    values = []
    for word in words:
        if item is bool:
            if word.lower() not in ("true", "false"):
                raise ValueError(f"{name} takes true or false, got {word}")
            values.append(word.lower() == "true")
            continue
        try:
            values.append(item(word))
        except ValueError:
            raise ValueError(f"{name} takes {'an integer' if item is int else 'a number'}, got {word!r}") from None
    return tuple(values) if several else values[0]


def arguments(argv: list[str] | None, about: str) -> tuple[argparse.Namespace, dict]:
    """(--profile, --output, --quiet; the fields that were overridden). Errors: ValueError, with near matches."""
    parser = Parser(
        prog="python -m lora_ref.course.finetune",
        usage="%(prog)s --profile NAME --output DIR [--quiet] [--FIELD X ...]",
        description=f"{about} The profile sets all defaults; an option changes one of its fields.",
        allow_abbrev=False,
    )
    parser.add_argument("--profile", metavar="NAME", help=", ".join(PROFILES))
    parser.add_argument("--output", metavar="DIR", type=Path, help="the run's directory")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    for f in fields(Profile):
        item, several = _kind(f)
        choices = ("true", "false") if item is bool else f.metadata["choices"]
        parser.add_argument(
            option(f.name),
            nargs="+" if several else None,
            metavar="|".join(choices) or "X",
            help=f.metadata["meaning"].replace("%", "%%"),
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        raise ValueError(f"{unknown[0]!r} is a value too many; --help shows as X [X ...] what takes several")
    if unknown:
        known = [option(f.name) for f in fields(Profile)] + ["--profile", "--output", "--quiet"]
        raise ValueError(f"{unknown[0]} is no option; {near(unknown[0], known)}")
    if lacking := [f"--{name}" for name in ("profile", "output") if getattr(args, name) is None]:
        raise ValueError(f"{' and '.join(lacking)} must be given, as in --profile cpu-mini --output DIR; see --help")
    given = {f.name: getattr(args, f.name) for f in fields(Profile) if getattr(args, f.name) is not None}
    return args, {name: parse(name, words if isinstance(words, list) else [words]) for name, words in given.items()}


class Parser(argparse.ArgumentParser):
    """One whose errors are ValueErrors, without forty lines of usage before them."""

    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(f) -> tuple[type, bool]:
    """(the type of a field's items, whether it is a list of them)."""
    return (f.type.__args__[0], True) if hasattr(f.type, "__args__") else (f.type, False)


def _checked(f, value):
    """The value of a field, in its type and range."""
    item, several = _kind(f)
    if not several:
        return _item(f.name, value, item, f.metadata)
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{f.name} must be a list of at least one {item.__name__}, got {value!r}")
    return tuple(_item(f.name, each, item, f.metadata) for each in value)


def _item(name: str, value, kind: type, meta: dict):
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r}; it is: {meta['meaning']}")
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(f"{name} = {value!r} is unknown; choose one of {', '.join(map(repr, meta['choices']))}")
    low, high = meta["low"], meta["high"]
    if kind in (int, float):
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            bound = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            unit = f" {meta['unit']}" if meta["unit"] else ""
            raise ValueError(f"{name} = {value!r} is out of range; choose {bound}{unit}")
    if kind is str and not value:
        raise ValueError(f"{name} is empty; it is: {meta['meaning']}")
    return kind(value)


HUB = Profile(
    model="Qwen/Qwen2.5-0.5B",
    data="tuetschek/e2e_nlg@refs/convert/parquet",
    train=42_000,
    validation=200,
    test=630,
    length=192,
    steps=2000,
    batch=32,
    seeds=(0, 1, 2),
    full_rates=(5e-6, 1e-5, 2e-5),
    lora_rates=(1e-4, 2e-4, 4e-4),
    device="cuda",
    precision="bf16",
    frozen="bf16",
)
GLUE = Profile(
    task="classification",
    model="FacebookAI/roberta-base",
    data="nyu-mll/glue:mrpc",
    train=100_000,
    validation=300,
    test=1000,
    length=512,
    lora_alpha=8.0,
    target_modules=("query", "value"),
    seeds=(0, 1, 2),
    full_rates=(1e-5, 2e-5, 4e-5),
    lora_rates=(2e-4, 4e-4, 8e-4),
    steps=6900,
    warmup=0.06,
    weight_decay=0.1,
    device="cuda",
    precision="bf16",
)
PROFILES = {
    # Each rate is better on the validation examples than its half and its double (this profile, seed 0).
    "cpu-mini": Profile(device="cpu", threads=1),
    "gpu-hub": HUB,
    # Hu et al. 2021 (arXiv 2106.09685), table 2 and table 9: r = 8 on query and value, batch 16, 30 and 60 epochs.
    "gpu-hub-mrpc": GLUE,
    "gpu-hub-sst2": replace(GLUE, data="nyu-mll/glue:sst2", lora_rates=(2.5e-4, 5e-4, 1e-3), steps=20_000),
    "gpu-offline": Profile(
        model="new",
        arms=("full", "r=1", "r=8", "r=64"),
        seeds=(0, 1, 2),
        full_rates=(1e-4, 2e-4, 4e-4),
        lora_rates=(1e-3, 2e-3, 4e-3),
        together=9,
        steps=400,
        batch=32,
        device="cuda",
        precision="bf16",
    ),
}
