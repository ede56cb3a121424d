"""The examples of a task: from the course's grammar, or out of tables with the columns of E2E or GLUE."""

import random
import re

from ...._checks import did_you_mean
from ...text.grammar import Example, examples
from ..config import DataSettings
from ..tables import load_tables, three_parts

RECORD_COLUMNS = ("meaning_representation", "mr")  # E2E's, and its files'
TEXT_COLUMNS = ("human_reference", "ref")
SENTENCE_COLUMNS = (("sentence1", "sentence2"), ("sentence",))  # MRPC's, SST-2's
SLOT = re.compile(r"\s*([^,\[\]]+?)\s*\[([^\[\]]*)\]\s*")


def examples_from_grammar(data: DataSettings) -> dict[str, list[Example]]:
    found, parts, start = examples(data.dataset, sum(data.max_samples.values()), texts=4), {}, 0
    for part, number in data.max_samples.items():
        parts[part] = found[start : start + number]
        start += number
    return parts


def examples_from_tables(data: DataSettings) -> dict[str, list[Example]]:
    """Records with all their texts, by part; a record is in one part only where the parts are cut here."""
    groups = {}
    for part, rows in load_tables(data.dataset).items():
        record, text = _column(data.dataset, rows[0], RECORD_COLUMNS), _column(data.dataset, rows[0], TEXT_COLUMNS)
        texts: dict[str, list[str]] = {}
        for i, row in enumerate(rows):
            if not row.get(record) or not row.get(text):
                raise ValueError(
                    f"{data.dataset}, {part} part: row {i + 1} has no {record if not row.get(record) else text}"
                )
            texts.setdefault(row[record], []).append(row[text])
        groups[part] = [Example("e2e", _slots(data.dataset, part, record), said) for record, said in texts.items()]
    parts = three_parts(groups, data.max_samples)
    random.Random(0).shuffle(parts["train"])
    return {"train": parts["train"]} | {part: parts[part][: data.max_samples[part]] for part in ("validation", "test")}


def _slots(data: str, part: str, record: str) -> dict[str, str]:
    """name[The Eagle], area[riverside] → {"name": "The Eagle", "area": "riverside"}."""
    found = SLOT.findall(record)
    if not found or SLOT.sub("", record).replace(",", "").strip():
        raise ValueError(f"{data}, {part} part: {record!r:.60} is no record; it must read slot[value], slot[value]")
    return dict(found)


def labelled_rows(data: DataSettings) -> tuple[dict[str, list[dict]], tuple[str, ...]]:
    """(rows with a label by part, the columns of the sentences). GLUE's test parts have labels of −1: no labels."""
    tables, columns = load_tables(data.dataset), ()
    parts = {}
    for part, rows in tables.items():
        label = _column(data.dataset, rows[0], ("label",))
        columns = next((names for names in SENTENCE_COLUMNS if all(name in rows[0] for name in names)), ())
        if not columns:
            raise ValueError(_missing_column(data.dataset, rows[0], "sentence1 and sentence2, or sentence"))
        kept = _rows_with_labels(data.dataset, part, rows, label, columns)
        if kept:
            parts[part] = kept
    if "train" not in parts:
        raise ValueError(f"{data.dataset} has no labelled row to train on")
    if "test" not in parts and "validation" in parts:  # as is usual with GLUE: its validation part is the test part
        parts["test"] = parts.pop("validation")
    parts = three_parts(parts, data.max_samples)
    return {part: rows[: data.max_samples[part]] for part, rows in parts.items()}, columns


def _rows_with_labels(data: str, part: str, rows: list[dict], label: str, columns: tuple[str, ...]) -> list[dict]:
    """The sentences and the label of each row, as text, without the rows whose label is negative."""
    kept = []
    for i, row in enumerate(rows):
        value = str(row[label]).strip()
        if not re.fullmatch(r"-?\d+", value):
            raise ValueError(f"{data}, {part} part: row {i + 1} has the label {row[label]!r}; it must be 0, 1, …")
        if int(value) >= 0:
            kept.append({name: row[name] or "" for name in columns} | {"label": value})
    return kept


def _column(data: str, row: dict, names: tuple[str, ...]) -> str:
    for name in names:
        if name in row:
            return name
    raise ValueError(_missing_column(data, row, " or ".join(names)))


def _missing_column(data: str, row: dict, wanted: str) -> str:
    known = [name for name in row if isinstance(name, str)]
    return (
        f"{data} has no column {wanted}; {did_you_mean(wanted.split(' ')[0], known) if known else 'it has no columns'}"
    )
