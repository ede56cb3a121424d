"""records: what ships is valid, was made from committed code, and says what it ran on."""

import json
import re
import statistics

import pytest

from lora_ref.course.finetune.records import HERE, load_record, shipped
from lora_ref.course.finetune.report import table

RECORDS = {name: load_record(name) for name in shipped()}
BENCH = HERE / "bench" / "cuda.json"  # python -m lora_ref.bench layer model compile --device cuda --json …
ON_GPU = [name for name, record in RECORDS.items() if record["environment"]["device"] == "cuda"]


def chosen(record, arm):
    return [run for run in record["runs"] if run["arm"] == arm and run["chosen"] and run["parallel_adapters"] == 1]


@pytest.mark.parametrize("name", RECORDS)
def test_a_shipped_record_can_be_traced_and_compares_arms_fairly(name):
    record = RECORDS[name]
    assert record["profile"] == name and record["environment"]["device_name"] in table(record)
    assert re.fullmatch("[0-9a-f]{40}", record["environment"]["git"]), "made from code that was not committed"
    for arm in record["settings"]["optimisation"]["arms"]:
        runs = [run for run in record["runs"] if run["arm"] == arm]
        assert len({run["seed"] for run in runs if run["chosen"]}) >= 3, f"{arm} has too few seeds"
        first = sorted(
            (run["lr"], run["validation"])
            for run in runs
            if run["seed"] == record["settings"]["optimisation"]["seeds"][0]
        )
        losses = [loss for _, loss in first]
        assert 0 < losses.index(min(losses)) < len(losses) - 1, f"{arm}: the best rate is at the edge of those tried"
        assert {run["lr"] for run in runs if run["chosen"]} == {first[losses.index(min(losses))][0]}


def test_cpu_mini_ships_and_says_cpu():
    assert RECORDS["cpu-mini"]["environment"]["device"] == "cpu"


def test_on_a_gpu_lora_takes_less_memory_and_no_more_time_than_full_fine_tuning():
    if not ON_GPU:
        pytest.skip("no record of a GPU ships: none was at hand")
    for record in map(RECORDS.get, ON_GPU):
        full = chosen(record, "full")
        for arm in set(record["settings"]["optimisation"]["arms"]) - {"full"}:
            lora = chosen(record, arm)
            assert max(r["peak_bytes"]["total"] for r in lora) < min(r["peak_bytes"]["total"] for r in full)
            assert max(r["tokens_per_s"] for r in lora) > max(r["tokens_per_s"] for r in full)


def test_on_a_gpu_a_layer_is_as_much_faster_than_peft_as_the_course_says_and_no_step_is_slower():
    if not BENCH.exists():
        pytest.skip("no benchmark of a GPU ships: none was at hand")
    found = json.loads(BENCH.read_text())
    assert found["environment"]["device"] != "cpu"
    layers, models = ([row["ratio"]["median"] for row in found["benchmarks"][name]] for name in ("layer", "model"))
    assert statistics.median(layers) <= 1 / 1.27
    assert max(models) <= 1
    assert {row["contender"] for row in found["benchmarks"]["compile"]} == {"lora_ref", "peft", "full"}
