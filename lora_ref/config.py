"""LoRAConfig: what an adapter is, in PEFT's field names; and the scale, computed here and nowhere else."""

import math
import numbers
from dataclasses import dataclass, field

from ._checks import check_integer

INITIALIZERS = (
    "kaiming",
    "gaussian",
    "zero_a",
    "random",
    "zero",
    "orthogonal",
    "pissa",
    "lora_ga",
)  # as initialization.py


def scale(lora_alpha: float, r: int, use_rslora: bool = False) -> float:
    """s = α/r, or α/√r with `use_rslora`: the factor in W = W0 + s·B·A. No unit.

    Errors: ValueError or TypeError unless r is an integer ≥ 1 and α a finite number > 0.
    Source: Hu et al. 2021 (arXiv 2106.09685), §4.1; Kalajdzievski 2023 (arXiv 2312.03732).
    """
    r = check_integer(r, "r", 1)
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, numbers.Real):
        raise TypeError(f"lora_alpha must be a number, got {lora_alpha!r}; PEFT's default is 8")
    if not (math.isfinite(lora_alpha) and lora_alpha > 0):
        raise ValueError(f"lora_alpha = {lora_alpha!r} is out of range; choose a finite number above 0, such as {r}")
    return float(lora_alpha) / (math.sqrt(r) if use_rslora else r)


@dataclass(frozen=True)
class LoRAConfig:
    """The hyperparameters of an adapter, by PEFT's names and with PEFT's defaults.

    r: rank of B·A, 1 … min(d, k). lora_alpha: α of the scale s, any finite number above 0.
    use_rslora: s = α/√r instead of α/r. lora_dropout: probability, in [0, 1), that the adapter (not the
    base) does not see an entry of its input while training. init_lora_weights: True (= "kaiming"), False
    (= "random") or a name of initialization.INITIALIZERS. bias: which biases are trained, "none", "all" or
    "lora_only". fan_in_fan_out: the base stores its weight as (in, out), as GPT-2 does.

    For whole models: target_modules and exclude_modules (a list of names or dotted suffixes, a regular
    expression, or "all-linear"), modules_to_save (trained in full), rank_pattern and alpha_pattern
    (regular expression → value). use_dora is refused while no lesson has built it.

    `scale` is s; `scale_of(r, lora_alpha)` is s under this config's rule for a layer that a pattern
    gives another r or α. Errors: ValueError or TypeError with the field, its value and the mend.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        scale(self.lora_alpha, self.r, self.use_rslora)
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= p < 1:
            raise ValueError(f"lora_dropout = {p!r} is out of range; choose 0 <= lora_dropout < 1, such as 0.1")
        for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.use_dora:
            raise ValueError("use_dora = True is not implemented; leave it False, or use peft for DoRA")
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights not in INITIALIZERS:
            known = ", ".join(INITIALIZERS)
            raise ValueError(
                f"init_lora_weights = {self.init_lora_weights!r} is unknown; choose True, False or {known}"
            )
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias = {self.bias!r} is unknown; choose 'none', 'all' or 'lora_only'")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            names = [] if value is None or (isinstance(value, str) and name != "modules_to_save") else value
            if not isinstance(names, (list, tuple, set)) or not all(isinstance(entry, str) for entry in names):
                kinds = "a list of names" if name == "modules_to_save" else "a list of names or one string"
                raise TypeError(f"{name} must be {kinds}, got {value!r}")
        for pattern, ranks in (("rank_pattern", True), ("alpha_pattern", False)):
            value = getattr(self, pattern)
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise TypeError(f"{pattern} must be a dict from regular expressions to numbers, got {value!r}")
            for key, number in value.items():
                try:
                    scale(self.lora_alpha, number) if ranks else scale(number, self.r)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{pattern}[{key!r}]: {error}") from None

    @property
    def scale(self) -> float:
        """s of W = W0 + s·B·A."""
        return self.scale_of()

    def scale_of(self, r: int | None = None, lora_alpha: float | None = None) -> float:
        """s under this config's rule, for this r and α where they are given."""
        r, lora_alpha = self.r if r is None else r, self.lora_alpha if lora_alpha is None else lora_alpha
        return scale(lora_alpha, r, self.use_rslora)

    @property
    def init_name(self) -> str:
        """The name, in initialization.INITIALIZERS, of how A and B begin."""
        return {True: "kaiming", False: "random"}.get(self.init_lora_weights, self.init_lora_weights)
