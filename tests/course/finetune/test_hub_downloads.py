"""Models, tables and finetune.py by Hub name: the real libraries download from a Hub on this machine (local_hub)."""

import hashlib
import importlib.util
import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ref.course.finetune.hub import load_model
from lora_ref.course.finetune.records import load_record
from tests.course.finetune.local_hub import LocalHub
from tests.course.finetune.tiny_models import llama, roberta

ROOT = Path(__file__).resolve().parents[3]
DATASETS = importlib.util.find_spec("datasets") is not None
needs_datasets = pytest.mark.skipif(not DATASETS, reason='needs the library datasets: pip install -e ".[hub]"')

E2E, MRPC = "owner/e2e@refs/convert/parquet", "owner/glue:mrpc"
CARD = """---
configs:
- config_name: mrpc
  data_files:
  - {split: train, path: mrpc/train-*}
  - {split: validation, path: mrpc/validation-*}
  - {split: test, path: mrpc/test-*}
- config_name: sst2
  data_files:
  - {split: train, path: sst2/train-*}
dataset_info:
- config_name: mrpc
  features:
  - {name: sentence1, dtype: string}
  - {name: sentence2, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': not_equivalent, '1': equivalent}}}
  - {name: idx, dtype: int32}
- config_name: sst2
  features:
  - {name: sentence, dtype: string}
  - {name: label, dtype: int64}
  - {name: idx, dtype: int64}
---
# GLUE
"""
WORKER = """
import hashlib, json, sys
from lora_ref.course.finetune.hub import load_model, load_tokenizer
from lora_ref.course.finetune.tables import load_tables

def digest(model):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()

for code in sys.argv[1:]:
    try:
        print(json.dumps(["value", eval(code)]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def e2e_rows(part, n):
    return [
        {
            "meaning_representation": f"name[The {part} {i // 2}], eatType[pub], familyFriendly[yes]",
            "human_reference": f"The {part} {i // 2} is a pub{' for all' * (i % 2)}.",
        }
        for i in range(n)
    ]


def mrpc_rows(n, labelled=True):
    return [
        {"sentence1": f"a {i}", "sentence2": f"a {i}" if i % 3 else "b", "label": int(i % 3 > 0) if labelled else -1}
        | {"idx": i}
        for i in range(n)
    ]


def parquet(rows):
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


E2E_PARTS = {"train": e2e_rows("train", 40), "validation": e2e_rows("dev", 6), "test": e2e_rows("test", 6)}
MRPC_PARTS = {"train": mrpc_rows(30), "validation": mrpc_rows(9), "test": mrpc_rows(4, labelled=False)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The models and data sets in the layouts that the originals have on huggingface.co."""
    directory = tmp_path_factory.mktemp("models")
    with LocalHub() as hub:
        hub.directory = directory
        for i, name in enumerate(("tiny", "second", "third", "broken")):
            commit = hub.add("model", f"owner/{name}", llama(directory / name, intermediate_size=24 + i))
        hub.broken.add(f"{commit}/model.safetensors")
        hub.add("model", "owner/roberta", roberta(directory / "roberta"))
        if DATASETS:
            hub.add("dataset", "owner/e2e", {"README.md": b"# E2E", "e2e.py": b"raise SystemExit('a script ran')"})
            files = {f"default/{part}/0000.parquet": parquet(rows) for part, rows in E2E_PARTS.items()}
            hub.add("dataset", "owner/e2e", files | {".gitattributes": b""}, "refs/convert/parquet")
            files = {f"mrpc/{part}-00000-of-00001.parquet": parquet(rows) for part, rows in MRPC_PARTS.items()}
            files["sst2/train-00000-of-00001.parquet"] = parquet([{"sentence": "good", "label": 1, "idx": 0}])
            hub.add("dataset", "owner/glue", files | {"README.md": CARD.encode()})
            hub.add("dataset", "owner/script", {"README.md": b"", "script.py": b"raise SystemExit('a script ran')"})
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def ran(hub, home, *command, **environment):
    environment = hub.environment(home) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=environment, cwd=home.parent, capture_output=True, text=True, timeout=300)


def asked(hub, home, calls, **environment):
    """{call: [what kind, what]} and what was printed beside it."""
    done = ran(hub, home, sys.executable, "-c", WORKER, *calls, **environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(calls, map(json.loads, done.stdout.splitlines()), strict=True)), done.stderr


LOADED = (
    "digest(load_model('owner/tiny'))",
    "load_tokenizer('owner/tiny')('name[The Eagle]').input_ids",
    "digest(load_model('owner/roberta', 'classification', 3))",
    f"load_tables('{E2E}')",
    f"load_tables('{MRPC}')",
)
REFUSED = (
    "load_model('owner/nothing')",
    "load_tokenizer('owner/nothing')",
    "load_model('owner/broken')",
    "load_tables('owner/nothing')",
    "load_tables('owner/glue')",
    "load_tables('owner/glue:rte')",
    "load_tables('owner/glue:mrpc@nowhere')",
    "load_tables('owner/script')",
    "load_tables('owner/e2e')",
)


@pytest.fixture(scope="module")
def online(hub, home):
    """What the calls gave, and what the Hub was asked for."""
    before = len(hub.requests)
    found, _ = asked(hub, home, LOADED + REFUSED)
    return found, hub.requests[before:]


@pytest.fixture(scope="module")
def offline(hub, home, online):
    """The same calls in a new process, and others, with no server at the address, after `hf download owner/third`."""
    script = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
    done = ran(hub, home, sys.executable, "-c", script, "download", "owner/third")
    assert done.returncode == 0, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    more = ("load_model('owner/second')", "digest(load_model('owner/third'))", "load_tables('owner/other')")
    return *asked(hub, home, LOADED + REFUSED + more, HF_ENDPOINT=nowhere), nowhere


def digest(model):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()


def test_models_and_tokenisers_come_by_name(hub, online):
    found, requests = online
    assert found[LOADED[0]] == ["value", digest(load_model(str(hub.directory / "tiny")))]
    assert found[LOADED[1]][0] == "value" and len(found[LOADED[1]][1]) > 2
    assert found[LOADED[2]] == ["value", digest(load_model(str(hub.directory / "roberta"), "classification", 3))]
    assert sum(request.startswith("GET /stored/") for request in requests if "safetensors" in request) >= 2


@needs_datasets
def test_data_sets_come_by_name_revision_and_configuration(online):
    found, requests = online
    assert found[LOADED[3]] == ["value", E2E_PARTS] and found[LOADED[4]] == ["value", MRPC_PARTS]
    stored = [request for request in requests if request.startswith("GET /stored/") and "parquet" in request]
    assert len(stored) == 6 and not any("sst2" in request for request in stored)


def test_models_that_the_hub_does_not_know_and_downloads_that_break_off(online):
    found, _ = online
    for call in REFUSED[:2]:
        kind, said = found[call]
        assert kind == "OSError" and said.startswith("owner/nothing cannot be loaded from the Hub: "), said
        assert "is not a valid model identifier" in said
    kind, said = found[REFUSED[2]]
    assert kind == "ConnectionError" and "the download of the model owner/broken failed: " in said, said


@needs_datasets
@pytest.mark.parametrize(
    "call, says",
    [
        ("load_tables('owner/nothing')", "'owner/nothing' doesn't exist on the Hub"),
        ("load_tables('owner/glue')", "Please pick one among the available configs: ['mrpc', 'sst2']"),
        ("load_tables('owner/glue:rte')", "'rte' not found. Available: ['mrpc', 'sst2']"),
        ("load_tables('owner/glue:mrpc@nowhere')", "Revision 'nowhere' doesn't exist"),
        ("load_tables('owner/script')", "scripts are no longer supported, but found script.py; its copy as parquet"),
        (
            "load_tables('owner/e2e')",
            "its copy as parquet may do: owner/e2e@refs/convert/parquet",
        ),  # although another revision is cached
    ],
)
def test_data_sets_that_cannot_be_had(online, call, says):
    kind, said = online[0][call]
    assert kind == "OSError" and says in said and "cannot be loaded from the Hub" in said, said


def test_models_come_again_without_the_hub(online, offline):
    found, printed, _ = offline
    assert [found[call] for call in LOADED[:3]] == [online[0][call] for call in LOADED[:3]]
    assert printed == "", "the libraries ask again and again"


def test_what_hf_download_brought_is_found(hub, offline):
    assert offline[0]["digest(load_model('owner/third'))"] == [
        "value",
        digest(load_model(str(hub.directory / "third"))),
    ]


def test_models_that_are_not_cached_are_refused_without_the_hub(offline):
    found, _, nowhere = offline
    for call in ("load_model('owner/second')", *REFUSED[:3]):
        kind, said = found[call]
        assert kind == "ConnectionError" and f"is not in the local cache, and {nowhere} cannot be reached" in said, said
    assert "`hf download owner/second`" in found["load_model('owner/second')"][1]


@needs_datasets
def test_data_sets_come_again_without_the_hub_and_others_are_refused(online, offline):
    found, _, nowhere = offline
    assert [found[call] for call in LOADED[3:]] == [online[0][call] for call in LOADED[3:]]
    for call in ("load_tables('owner/other')", *REFUSED[5:]):  # with a revision or configuration that is not there
        kind, said = found[call]
        assert kind == "ConnectionError" and f"is not in the local cache, and {nowhere} cannot be reached" in said, said
        assert f'`python -c "from lora_ref.course.finetune.tables import load_tables; {call}"`' in said


FEW = "--device cpu --precision fp32 --frozen-dtype fp32 --steps 4 --batch-size 4 --max-train-samples 24"
FEW += " --max-validation-samples 4 --max-test-samples 3 --num-samples 1"
FEW += " --num-evals 2 --max-new-tokens 4 --seeds 0 --full-lrs 1e-3 --lora-lrs 1e-2 --quiet"


@needs_datasets
@pytest.mark.parametrize(
    "profile, model, data, length",
    [("gpu-hub", "owner/tiny", E2E, 128), ("gpu-hub-mrpc", "owner/roberta", MRPC, 60)],
)
def test_the_command_runs_on_hub_names(hub, tmp_path, profile, model, data, length):
    before, output = len(hub.requests), tmp_path / "run"
    names = [
        "--profile",
        profile,
        "--model",
        model,
        "--dataset",
        data,
        "--output",
        str(output),
        "--max-length",
        str(length),
    ]
    done = ran(hub, tmp_path / "home", sys.executable, "-m", "lora_ref.course.finetune", *names, *FEW.split())
    assert done.returncode == 0, done.stderr
    requests = "\n".join(hub.requests[before:])
    assert "model.safetensors" in requests and ".parquet" in requests, "nothing was downloaded"
    record = load_record(output / "record.json")
    assert (record["model"], record["data"]) == (model, data)
    assert [run["arm"] for run in record["runs"]] == ["full", "r=8"]
    assert all(len(run["losses"]) == 4 and run["after"]["loss"] != run["before"]["loss"] for run in record["runs"])
