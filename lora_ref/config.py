"""LoRAConfig: what an adapter is, in PEFT's field names; and the scale, computed here and nowhere else."""

import math
from dataclasses import dataclass, field

from ._checks import check_bool, check_choice, check_integer, check_positive, check_probability

INITIALIZERS = ("kaiming", "gaussian", "zero_a", "random", "zero", "orthogonal", "pissa", "lora_ga")
"""The names of `initialization.INITIALIZERS`, in its order."""
BIASES = ("none", "all", "lora_only")


def scale(lora_alpha: float, r: int, use_rslora: bool = False) -> float:
    """s = α/r, or α/√r with `use_rslora`: the factor in W = W0 + s·B·A.

    Args:
        lora_alpha: α, any finite number above 0.
        r: the rank, an integer ≥ 1.
        use_rslora: whether to divide by √r instead of r (rank-stabilised LoRA).

    Returns:
        s, without unit.

    Raises:
        TypeError: r is not an integer, or α not a number.
        ValueError: r is below 1, or α not a finite number above 0.

    Example:
        >>> scale(6, 4), scale(6, 4, use_rslora=True)
        (1.5, 3.0)

    Source:
        Hu et al. 2021 (arXiv 2106.09685), section 4.1; Kalajdzievski 2023 (arXiv 2312.03732).
    """
    r = check_integer(r, "r", 1)
    check_positive(lora_alpha, "lora_alpha", "PEFT's default is 8")
    return float(lora_alpha) / (math.sqrt(r) if use_rslora else r)


@dataclass(frozen=True)
class LoRAConfig:
    """The hyperparameters of an adapter, by PEFT's names and with PEFT's defaults.

    `scale` is s, and `scale_of(r, lora_alpha)` s under this config's rule for a layer that a pattern gives another
    r or α. A config is a value: it cannot be changed, and equal fields make equal configs.

    Args:
        r: rank of B·A, 1 … min(d, k).
        lora_alpha: α of the scale s, any finite number above 0.
        target_modules: the modules to adapt: a list of names or dotted suffixes, a regular expression that matches a
            whole path, or "all-linear". Only for whole models.
        exclude_modules: the modules to leave out, in the same ways. Only for whole models.
        lora_dropout: probability, in [0, 1), that the adapter (not the base) does not see an entry of its input while
            training.
        use_rslora: s = α/√r instead of α/r.
        use_dora: refused when True: not implemented.
        init_lora_weights: True (= "kaiming"), False (= "random") or a name of `initialization.INITIALIZERS`.
        rank_pattern: regular expression → r of the modules whose path it matches.
        alpha_pattern: regular expression → α of the modules whose path it matches.
        fan_in_fan_out: the base stores its weight as (in, out), as GPT-2 does.
        bias: which biases are trained: "none", "all" or "lora_only".
        modules_to_save: names of modules that are trained in full. Only for whole models.

    Raises:
        TypeError: a field has a value of the wrong kind; the message names the field, its value and the fix.
        ValueError: a field has a value out of range or one that is unknown.

    Example:
        >>> config = LoRAConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
        >>> config.scale, config.scale_of(r=3), config.init_name
        (1.5, 2.0, 'kaiming')

    Source:
        PEFT's LoraConfig; Hu et al. 2021 (arXiv 2106.09685).
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
        for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
            check_bool(getattr(self, name), name)
        scale(self.lora_alpha, self.r, self.use_rslora)
        check_probability(self.lora_dropout, "lora_dropout")
        if self.use_dora:
            raise ValueError("use_dora = True is not implemented; leave it False, or use peft for DoRA")
        check_choice(self.init_lora_weights, "init_lora_weights", (True, False, *INITIALIZERS))
        check_choice(self.bias, "bias", BIASES)
        _check_names(self.target_modules, "target_modules", or_one_string=True)
        _check_names(self.exclude_modules, "exclude_modules", or_one_string=True)
        _check_names(self.modules_to_save, "modules_to_save", or_one_string=False)
        for key, r in _checked_items(self.rank_pattern, "rank_pattern"):
            self._check_entry(f"rank_pattern[{key!r}]", r=r)
        for key, lora_alpha in _checked_items(self.alpha_pattern, "alpha_pattern"):
            self._check_entry(f"alpha_pattern[{key!r}]", lora_alpha=lora_alpha)

    def _check_entry(self, where: str, **value) -> None:
        """Refuse an r or α of a pattern that the whole config could not have."""
        try:
            scale(**{"lora_alpha": self.lora_alpha, "r": self.r, **value})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None

    @property
    def scale(self) -> float:
        """s of W = W0 + s·B·A, without unit."""
        return self.scale_of()

    def scale_of(self, r: int | None = None, lora_alpha: float | None = None) -> float:
        """s under this config's rule, for this r and α; None takes the config's own."""
        if r is None:
            r = self.r
        if lora_alpha is None:
            lora_alpha = self.lora_alpha
        return scale(lora_alpha, r, self.use_rslora)

    @property
    def init_name(self) -> str:
        """The name, in `initialization.INITIALIZERS`, of how A and B start."""
        if self.init_lora_weights is True:
            return "kaiming"
        if self.init_lora_weights is False:
            return "random"
        return self.init_lora_weights


def _check_names(value: object, field_name: str, or_one_string: bool) -> None:
    """Refuse anything but None, a collection of strings or, where it is allowed, one string."""
    if value is None or (or_one_string and isinstance(value, str)):
        return
    if not isinstance(value, list | tuple | set) or not all(isinstance(entry, str) for entry in value):
        kinds = "a list of names or one string" if or_one_string else "a list of names"
        raise TypeError(f"{field_name} must be {kinds}, got {value!r}")


def _checked_items(value: object, field_name: str):
    """The entries of a pattern, after a check that it is a dict with strings as keys."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{field_name} must be a dict from regular expressions to numbers, got {value!r}")
    return value.items()
