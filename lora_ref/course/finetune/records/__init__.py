"""Records of fine-tuning experiments: what was run, on what, what came out; one JSON file each, checked field by field.

    record = load_record("cpu-mini")                 # that ships with the package; or the path of a file
    write_record(record, "out/record.json")          # checked first, written beside, renamed into place

The schema is `schema.Record`, a pydantic model; `describe()` prints it. A record says whether it came from a CPU or a
GPU, and which: a CPU's has no driver, and so no number in it can pass for a GPU's. Records of the former format are
read too, and come in today's names: see `legacy`.

A record ships as <its profile>.json in this directory: run from committed code, at least three seeds, the best rate
not at the edge of those tried; tests/course/finetune/test_shipped_records.py demands that, and more of a GPU's.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from ...._checks import did_you_mean
from ...._files import write_json
from .legacy import upgrade_record
from .schema import FORMAT, Record, leaves

__all__ = ["FORMAT", "HERE", "Record", "check_record", "describe", "load_record", "shipped", "write_record"]

HERE = Path(__file__).parent


def check_record(record: dict) -> dict:
    """Refuse what is no whole record.

    Args:
        record: as JSON gives it; of the former format too.

    Returns:
        The record itself, or, of the former format, the same in today's names.

    Raises:
        ValueError: with all faults, each with the field's path: fields that are missing or unknown (with near
            matches), values of another kind or out of range, and fields that contradict each other, such as a CPU's
            record with a GPU's driver.

    Example:
        >>> record = load_record("cpu-mini")
        >>> check_record(record) is record
        True
        >>> check_record(record | {"seconds": -1})
        Traceback (most recent call last):
            ...
        ValueError: no valid record, 1 fault(s): seconds = -1 is out of range: at least 0 s, finite
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"no valid record, 1 fault(s): the record must be an object, got {record!r:.40}")
    record = upgrade_record(record)
    try:
        Record.model_validate(record)
    except ValidationError as error:
        faults = [words for fault in error.errors(include_url=False) for words in _in_words(fault, record)]
        raise ValueError(f"no valid record, {len(faults)} fault(s): " + "; ".join(faults)) from None
    return record


def load_record(source: str | os.PathLike) -> dict:
    """Read a record and check it.

    Args:
        source: the name of a record that ships, or the path of a file.

    Returns:
        The record, in today's names.

    Raises:
        FileNotFoundError: neither a record that ships nor a file.
        ValueError: no JSON, or no whole record; as `check_record`, with the file's path.

    Example:
        >>> record = load_record("cpu-mini")
        >>> record["environment"]["device"], record["settings"]["optimisation"]["seeds"]
        ('cpu', [0, 1, 2])
        >>> sorted({run["arm"] for run in record["runs"]})
        ['full', 'r=8']
    """
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
    """The names of the records that ship.

    Returns:
        Names that `load_record` takes, in order.

    Example:
        >>> "cpu-mini" in shipped()
        True
    """
    return sorted(path.stem for path in HERE.glob("*.json"))


def write_record(record: dict, path: str | os.PathLike) -> None:
    """Check the record and write it; whatever happens, what was there stays whole until the new one is."""
    write_json(check_record(record), path)


def describe() -> str:
    """All fields, one a line: path, kind, unit, meaning."""
    lines = []
    for leaf in leaves():
        kind = leaf.kind + (" or null" if leaf.nullable else "")
        lines.append(f"{leaf.path:<40}{kind:<18}{leaf.unit:<36}{leaf.meaning}".rstrip())
    return "\n".join(lines)


LEAVES = {leaf.path: leaf for leaf in leaves()}


def _in_words(fault: Mapping, record: Mapping) -> list[str]:
    """What pydantic found, in the words of this project; a contradiction may be several."""
    kind, value, location = fault["type"], fault["input"], fault["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    leaf = LEAVES.get(re.sub(r"\[\d+\]", "[]", path))
    if kind == "value_error":
        return str(fault["ctx"]["error"]).split("\n")
    if kind == "missing":
        return [f"{path} is missing"]
    if kind == "extra_forbidden":
        return [f"{path} is unknown{_hint(location, record)}"]
    if kind in ("list_type", "too_short"):
        least = fault.get("ctx", {}).get("min_length", 0)
        return [f"{path} must be a list of {least} or more, got {value!r:.40}"]
    if kind == "literal_error":
        return [f"{path} must be one of {', '.join(leaf.choices)}, got {value!r:.40}"]
    if kind in ("greater_than_equal", "less_than_equal", "finite_number"):
        return [f"{path} = {value!r} is out of range: {leaf.range}"]
    return [f"{path} must be {leaf.kind if leaf else 'an object'}, got {value!r:.40}"]


def _hint(location: tuple, record: Mapping) -> str:
    """The nearest field that the object lacks."""
    *parents, name = location
    known = [path.rpartition(".")[2] for path in LEAVES if path.rpartition(".")[0] == _pattern(parents)]
    known += [path.split(".")[0].removesuffix("[]") for path in LEAVES] if not parents else []
    for part in parents:
        record = record[part]
    near = did_you_mean(str(name), [field for field in dict.fromkeys(known) if field not in record], listed=0)
    return f" (is it {near.split(chr(39))[1]}?)" if near else ""


def _pattern(location: list) -> str:
    """A fault's place as `Leaf.path` writes it: runs[] for ("runs", 3)."""
    return "".join("[]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
