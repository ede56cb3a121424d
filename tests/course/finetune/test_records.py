"""records: a record is what its schema says, and nothing else passes for one; those of the former format are read."""

import copy
import json
import os
import re
from pathlib import Path

import pytest

from lora_ref._files import write_json
from lora_ref.course.finetune.profiles import profile
from lora_ref.course.finetune.records import (
    FORMAT,
    HERE,
    check_record,
    describe,
    load_record,
    shipped,
    write_record,
)
from lora_ref.course.finetune.records.legacy import FORMER_FORMAT
from lora_ref.course.finetune.records.schema import leaves
from lora_ref.course.finetune.settings import to_profile

LEAVES = list(leaves())
BEFORE = Path(__file__).parents[2] / "data" / "before_the_rooms"


def sample(leaf):
    """A valid value."""
    low = leaf.low if leaf.low is not None else -1
    values = {"integer": max(0, int(low)) + 3, "number": low + 0.5, "boolean": True, "map": {"a": 1}, "text": "r=4"}
    return leaf.choices[0] if leaf.choices else values[leaf.kind]


def steps(path):
    """A leaf's path as keys, [0] where any item may stand: ("runs", 0, "lr")."""
    return [0 if part == "[]" else part for part in re.findall(r"\[\]|\w+", path)]


def put(place, path, value):
    """Set a value deep inside of objects and lists, which are made where they are not there."""
    key, *rest = path
    if isinstance(place, list) and not place:
        place.append(None)
    inner = place[0] if isinstance(place, list) else place.get(key)
    if not rest:
        place[key] = value
        return
    if inner is None:
        inner = place[key] = [] if rest[0] == 0 else {}
    put(inner, rest, value)


@pytest.fixture
def record():
    made = {}
    for leaf in LEAVES:
        put(made, steps(leaf.path), sample(leaf))
    made["runs"].append(copy.deepcopy(made["runs"][0]))
    made["environment"] |= {"device": "cpu", "driver": None, "cuda": None}
    for run in made["runs"]:
        run["peak_bytes"] = {"total": 10, "weights": 1, "gradients": 2, "optimizer": 3, "activations": 4}
    return made


def at(record, path):
    for key in path:
        record = record[key]
    return record


def dotted(path):
    return ".".join(map(str, path)).replace(".0", "[0]")


def test_the_sample_is_valid_and_check_returns_it(record):
    assert check_record(record) is record and record["format"] == FORMAT


def test_every_field_refuses_another_kind_and_what_is_out_of_its_range(record, refused):
    seen = 0
    for path, field in [(steps(leaf.path), leaf) for leaf in LEAVES]:
        wrong = [{"text": 3, "map": [], "boolean": 1, "integer": 2.5, "number": "3"}[field.kind], object]
        wrong += [] if field.nullable else [None]
        if field.kind in ("integer", "number"):
            wrong += [True, float("nan"), float("inf")]
            wrong += [] if field.low is None else [type(at(record, path))(field.low - 1)]
            wrong += [] if field.high is None else [field.high + 1]
        wrong += ["none of these"] if field.choices else []
        for value in wrong:
            broken = copy.deepcopy(record)
            at(broken, path[:-1])[path[-1]] = value
            refused(lambda: check_record(broken), dotted(path))
            seen += 1
    assert seen > 200


def test_every_field_may_not_be_missing_but_those_of_a_newer_environment_and_null_stands_only_where_the_schema_says(
    record, refused
):
    for path in [steps(leaf.path) for leaf in LEAVES if leaf.required]:
        if isinstance(path[-1], str):
            broken = copy.deepcopy(record)
            del at(broken, path[:-1])[path[-1]]
            refused(lambda: check_record(broken), f"{dotted(path)} is missing")
    nulled = copy.deepcopy(record)
    for name in ("bleu", "slot_errors", "accuracy", "f1"):
        nulled["runs"][0]["after"][name] = None
    nulled["runs"][0]["energy_joules"] = nulled["slot_rule"] = nulled["environment"]["git"] = None
    check_record(nulled)


def test_unknown_fields_are_named_with_near_matches_and_all_faults_are_named_at_once(record, refused):
    record["runs"][1]["token_per_s"] = record["runs"][1].pop("tokens_per_s")
    record["sedonds"] = 3
    refused(
        lambda: check_record(record),
        "3 fault(s)",
        "runs[1].tokens_per_s is missing",
        "runs[1].token_per_s is unknown (is it tokens_per_s?)",
        "sedonds is unknown",
    )
    refused(lambda: check_record([record]), "must be an object")


@pytest.mark.parametrize("empty", ["runs", "losses", "curve"])
def test_lists_that_must_hold_something(record, refused, empty):
    (record if empty == "runs" else record["runs"][0])[empty] = []
    refused(lambda: check_record(record), empty, "a list of 1 or more")


def test_a_cpus_record_claims_no_gpu_and_a_gpus_says_which(record, refused):
    record["environment"]["driver"] = "550.1"
    refused(lambda: check_record(record), "environment.driver is '550.1', but the device is cpu")
    record["environment"] |= {"device": "cuda", "cuda": "12.8", "libraries": {"torch": "2.13.0"}}
    check_record(record)
    record["environment"]["libraries"]["torch"] = "2.13.0+cpu"
    refused(lambda: check_record(record), "torch was built for the CPU alone")
    record["environment"] |= {"driver": None, "libraries": {}}
    refused(lambda: check_record(record), "environment.driver is None, but the device is cuda")


def test_what_does_not_go_together_is_refused(record, refused):
    record["runs"][0]["arm"] = "full"
    refused(lambda: check_record(record), "runs[0].adapter is", "the arm is full")
    record["runs"][0] |= {"adapter": None, "adapter_directory": None}
    check_record(record)
    record["runs"][1]["peak_bytes"]["weights"] = 7
    refused(lambda: check_record(record), "runs[1].peak_bytes.total is 10, but its parts are [7, 2, 3, 4]")
    record["runs"][1]["peak_bytes"] = dict.fromkeys(record["runs"][1]["peak_bytes"])
    check_record(record)


def test_a_record_comes_back_from_its_file_and_a_bad_one_does_not_replace_it(record, tmp_path, refused):
    path = tmp_path / "record.json"
    record["runs"][0]["samples"][0]["after"] = "Ünïcode → \n and\ttabs 🙂"
    write_record(record, path)
    assert load_record(path) == record
    before = path.read_bytes()
    refused(lambda: write_record(record | {"seconds": -1}, path), "seconds = -1", "at least 0 s")
    refused(lambda: write_json({"x": float("nan")}, path), "JSON")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["record.json"]


def test_a_crash_while_writing_leaves_the_old_file_whole(record, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_record(record, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_record(record | {"seconds": 5}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize("content", ["", '{"format": ', "[]", b"\xff\xfe"])
def test_files_that_are_no_records_are_refused_by_name(tmp_path, refused, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: load_record(path), str(path))
    with pytest.raises(FileNotFoundError, match="nor a record that ships"):
        load_record(tmp_path / "cpu-maxi")


def test_the_records_that_ship_are_valid_and_say_where_they_come_from():
    for name in shipped():
        record = load_record(name)
        assert record["profile"] == name and record["environment"]["device_name"]
        assert "/" + "tmp" not in json.dumps(record)


def test_the_description_has_a_line_for_every_field():
    lines = describe().splitlines()
    assert len(lines) == len(LEAVES) > 50 and all(leaf.meaning for leaf in LEAVES)
    assert any(line.startswith("runs[].tokens_per_s") and "tokens/s" in line for line in lines)


def test_a_record_of_the_former_format_comes_in_todays_names_and_loses_nothing():
    old = json.loads((HERE / "cpu-mini.json").read_text(encoding="utf-8"))
    assert old["format"] == FORMER_FORMAT and "rate" in old["runs"][0] and "together" in old["runs"][0]
    new = load_record("cpu-mini")
    assert new["format"] == FORMAT and len(new["runs"]) == len(old["runs"])
    for now, then in zip(new["runs"], old["runs"], strict=True):
        assert (now["lr"], now["parallel_adapters"]) == (then["rate"], then["together"])
        assert {k: v for k, v in now.items() if k in then} == {
            k: v for k, v in then.items() if k not in ("rate", "together")
        }
    settings = new["settings"]
    assert (settings["optimisation"]["full_lrs"], settings["data"]["dataset"]) == (
        old["settings"]["full_rates"],
        old["settings"]["data"],
    )
    assert sum(len(group) for group in settings.values()) == len(old["settings"])
    assert to_profile(settings).optimisation.steps == old["settings"]["steps"]
    assert to_profile(profile("cpu-mini").model_dump()) == profile("cpu-mini")


def test_a_record_that_the_code_before_the_rooms_wrote_is_read():
    record = load_record(BEFORE / "record.json")
    assert {run["arm"] for run in record["runs"]} == {"full", "r=8"}
    assert {run["parallel_adapters"] for run in record["runs"]} == {1, 2}
    assert record["settings"]["optimisation"]["lora_lrs"] == [0.004, 0.008]


def test_what_is_wrong_in_a_record_of_the_former_format_is_named(refused):
    old = json.loads((HERE / "cpu-mini.json").read_text(encoding="utf-8"))
    del old["runs"][1]["rate"]
    refused(lambda: check_record(old), "1 fault(s)", "runs[1].lr is missing")
    old["settings"]["stepz"] = 3
    refused(lambda: check_record(old), "a profile has no field 'stepz'", "'steps'")
