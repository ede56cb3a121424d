"""course/tables.py: rows from files, directories and Hub names, in three parts."""

import json
import sys

import pytest

from lora_ref.course.finetune import tables
from lora_ref.course.finetune.tables import load_tables, read_table, three_parts
from tests.course.finetune.tiny_models import e2e, sst2, write_csv

ROWS = [{"mr": "name[A, B]", "ref": 'He said "no",\nand left. é'}, {"mr": "name[C]", "ref": "x"}]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_the_same_rows_come_from_every_kind_of_file(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "csv":
        write_csv(path, ["mr", "ref"], [tuple(row.values()) for row in ROWS])
    elif suffix == "tsv":
        quoted = ROWS[0]["ref"].replace('"', '""')
        path.write_text(f'mr\tref\nname[A, B]\t"{quoted}"\nname[C]\tx\n', encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    assert read_table(path) == ROWS and load_tables(str(path)) == {"train": ROWS}


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfmr,ref\nname[A],x\n")
    assert list(read_table(tmp_path / "a.csv")[0]) == ["mr", "ref"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", "[1, 2]"),
        ("a.json", "{}"),
        ("a.jsonl", '{"a": 1}\n{"a":'),
        ("a.csv", b"\xff\xfe\x00"),
        ("a.txt", "x"),
    ],
)
def test_files_that_are_not_what_their_names_say(tmp_path, refused, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: load_tables(str(tmp_path / name)), name, "cannot be read")


def test_a_directorys_files_are_its_parts_by_how_their_names_begin(tmp_path, refused):
    tables = load_tables(e2e(tmp_path / "e2e"))
    assert {part: len(rows) for part, rows in tables.items()} == {"train": 24, "validation": 6, "test": 6}
    for old, new in (("train", "trainset"), ("validation", "devset"), ("test", "testset_w_refs")):  # as E2E's own
        (tmp_path / "e2e" / f"{old}.csv").rename(tmp_path / "e2e" / f"{new}.csv")
    assert load_tables(str(tmp_path / "e2e")) == tables
    write_csv(tmp_path / "e2e" / "train2.csv", ["mr", "ref"], [])
    refused(lambda: load_tables(str(tmp_path / "e2e")), "several files for train", "train2.csv, trainset.csv")
    (tmp_path / "none").mkdir()
    refused(lambda: load_tables(str(tmp_path / "none")), "no training file", "train….csv", "none")


def test_a_data_set_without_rows_is_refused(tmp_path, refused):
    write_csv(tmp_path / "train.csv", ["meaning_representation", "human_reference"], [])
    refused(lambda: load_tables(str(tmp_path)), "no row to train on", "'train': 0")


def test_a_hub_name_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'pip install datasets, or .* pip install -e "\.\[hub\]"; or name a local csv'
    ):
        load_tables("tuetschek/e2e_nlg")


def test_without_a_network_a_data_set_is_refused_at_once_with_what_to_do(no_network, monkeypatch):
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "datasets", None)  # it is not even imported
    with pytest.raises(ConnectionError) as error:
        load_tables("nyu-mll/glue:sst2@abc")
    for part in ("load_tables('nyu-mll/glue:sst2@abc')", "HF_HOME", "cpu-mini", "gpu-offline"):
        assert part in str(error.value)


def test_missing_parts_are_cut_from_the_training_part_disjointly_and_the_same_each_time(refused):
    items, most = list(range(37)), {"validation": 100, "test": 2}
    parts = three_parts({"train": items}, most)
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [32, 3, 2]
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == items
    assert parts == three_parts({"train": items}, most) and items == list(range(37))
    assert three_parts({"train": items, "test": [99]}, most)["test"] == [99]
    refused(lambda: three_parts({"train": [1, 2]}, most), "too few examples", "three at least")


def test_glues_form_is_read(tmp_path):
    tables = load_tables(sst2(tmp_path / "sst2"))
    assert {row["label"] for row in tables["test"]} == {-1} and len(tables["train"]) == 24
