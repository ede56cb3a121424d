"""The settings of a profile by their flat names, and in words: for options, overrides, help and error messages.

    SETTINGS["batch_size"]          # where it is in a Profile, its type, range, unit, choices and description
    SETTINGS["base_batch_size"]     # the field batch_size of the group base

Nothing is declared here: all of it is read from the JSON schema of lora_ref.course.finetune.config.Profile.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from ..._checks import did_you_mean
from .config import Profile

KINDS = {"integer": int, "number": float, "boolean": bool, "string": str}  # of JSON schema
# Flat names before they were transformers': new name by old name.
RENAMED = {
    "data": "dataset",
    "train": "max_train_samples",
    "validation": "max_validation_samples",
    "test": "max_test_samples",
    "length": "max_length",
    "new_tokens": "max_new_tokens",
    "samples": "num_samples",
    "full_rates": "full_lrs",
    "lora_rates": "lora_lrs",
    "together": "parallel_adapters",
    "batch": "batch_size",
    "accumulate": "gradient_accumulation_steps",
    "warmup": "warmup_ratio",
    "clip": "max_grad_norm",
    "evaluations": "num_evals",
    "frozen": "frozen_dtype",
    "checkpointing": "gradient_checkpointing",
    "base_hidden": "base_hidden_size",
    "base_layers": "base_num_layers",
    "base_heads": "base_num_heads",
    "base_batch": "base_batch_size",
    "base_rate": "base_lr",
}


@dataclass(frozen=True)
class Setting:
    """One field of a profile's group. `kind`, `low`, `high` and `choices` are those of a list's items.

    `item` describes the items of a list, where that is more than their range.
    """

    name: str
    group: str
    field: str
    kind: type
    is_list: bool
    default: object
    description: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    item: str = ""

    @property
    def range(self) -> str:
        """Such as "at least 2 steps" or "between 0 and 0.99"; empty where every value is allowed."""
        if self.low is None:
            return ""
        bounds = f"at least {self.low:g}" if self.high is None else f"between {self.low:g} and {self.high:g}"
        return f"{bounds} {self.unit}".rstrip()


def flat_name(group: str, field: str) -> str:
    """The name of a setting in options and overrides: its own, but base's have the prefix base_, except `model`."""
    return f"base_{field}" if group == "base" and field != "model" else field


def _settings() -> dict[str, Setting]:
    found = {}
    for group, info in Profile.model_fields.items():
        for field, schema in info.annotation.model_json_schema()["properties"].items():
            item, name = schema.get("items", schema), flat_name(group, field)
            assert name not in found, f"two settings are called {name}"
            found[name] = Setting(
                name=name,
                group=group,
                field=field,
                kind=KINDS[item["type"]],
                is_list="items" in schema,
                default=getattr(info.default, field),
                description=schema["description"],
                unit=schema.get("unit", ""),
                low=item.get("minimum"),
                high=item.get("maximum"),
                choices=tuple(item.get("enum", ())),
                item=item.get("description", "") if "items" in schema else "",
            )
    return found


SETTINGS = _settings()


def flatten(settings: Mapping[str, Mapping]) -> dict[str, object]:
    """Flat names → values, of a profile's groups as `model_dump` gives them."""
    return {flat_name(group, field): value for group, fields in settings.items() for field, value in fields.items()}


def nest(flat: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The groups of a profile with these settings alone; flatten's inverse.

    Raises:
        ValueError: a name that no setting has, with its new name or near ones.
    """
    nested: dict[str, dict[str, object]] = {group: {} for group in Profile.model_fields}
    for name, value in flat.items():
        if name in RENAMED:
            raise ValueError(f"{name} is called {RENAMED[name]} now")
        if name not in SETTINGS:
            raise ValueError(f"a profile has no field {name!r}; {did_you_mean(name, SETTINGS)}")
        nested[SETTINGS[name].group][SETTINGS[name].field] = value
    return nested


def to_profile(settings: Mapping[str, Mapping]) -> Profile:
    """The profile with these groups, such as a record's settings; what is not there has its default.

    Raises:
        ValueError, TypeError: with the flat name of each setting that is wrong, its value, its range or choices.
    """
    try:
        return Profile.model_validate(settings)
    except ValidationError as error:
        raise _in_words(error) from None


def override(profile: Profile, **flat: object) -> Profile:
    """The profile with these settings, by flat name, instead of its own. Errors as nest's and to_profile's."""
    changes = nest(flat)
    return to_profile({group: own | changes[group] for group, own in profile.model_dump().items()})


def _in_words(error: ValidationError) -> ValueError | TypeError:
    """All faults that pydantic found, in the words of this project."""
    faults = [_fault(fault) for fault in error.errors(include_url=False)]
    all_types = all(isinstance(fault, TypeError) for fault in faults)
    return (TypeError if all_types else ValueError)("; ".join(map(str, faults)))


def _fault(fault: Mapping) -> ValueError | TypeError:
    kind, value, path = fault["type"], fault["input"], fault["loc"]
    group, field = (str(part) for part in (*path, "", "")[:2])
    setting = SETTINGS.get(flat_name(group, field)) if field else None
    if setting is None:
        return _fault_of_a_group(kind, value, group, field, fault)
    name, its = setting.name, f"it is: {setting.description}"
    if kind == "value_error":
        return ValueError(f"{name} = {value!r} {fault['ctx']['error']}")
    if kind == "string_pattern_mismatch":
        return ValueError(f"{name} has {value!r}; {setting.item}")
    if kind == "string_too_short":
        return ValueError(f"{name} is empty; {its}")
    if kind == "literal_error" and isinstance(value, str):
        return ValueError(f"{name} = {value!r} is unknown; choose one of {', '.join(map(repr, setting.choices))}")
    if kind in ("greater_than_equal", "less_than_equal", "finite_number"):
        return ValueError(f"{name} = {value!r} is out of range; choose {setting.range}")
    if setting.is_list and len(path) == 2:
        return TypeError(f"{name} must be a list of at least one {setting.kind.__name__}, got {value!r}; {its}")
    return TypeError(f"{name} must be {setting.kind.__name__}, got {value!r}; {its}")


def _fault_of_a_group(kind: str, value: object, group: str, field: str, fault: Mapping) -> ValueError | TypeError:
    if kind == "value_error":  # settings that contradict each other
        return ValueError(str(fault["ctx"]["error"]))
    if kind == "extra_forbidden":
        known = [s.field for s in SETTINGS.values() if s.group == group] if field else list(Profile.model_fields)
        where = f"the group {group}" if field else "a profile"
        return ValueError(f"{where} has no field {field or group!r}; {did_you_mean(field or group, known)}")
    return TypeError(f"{group or 'a profile'} must be a map of settings, got {value!r:.60}")
