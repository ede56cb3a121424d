"""course/sources.py: models and tables from directories and files, the Hub by name, and what is said without it."""

import json
import os
import socket
import sys
import time

import pytest
import torch
from tiny_models import e2e, llama, roberta, sst2, write_csv

from lora_ref.course import sources
from lora_ref.course.sources import load_model, load_tables, load_tokenizer, read_table, three_parts


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No host has an address, no proxy is set, nothing is cached; whoever asks the Hub all the same fails."""
    from huggingface_hub import constants

    def refuse(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    for key in list(os.environ):
        if key.lower().endswith("_proxy"):
            monkeypatch.delenv(key)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_models_come_from_a_directory_in_float32_and_eval_mode(tmp_path):
    causal = load_model(llama(tmp_path / "llama", dtype="bfloat16"))
    assert type(causal).__name__ == "LlamaForCausalLM" and not causal.training
    assert {p.dtype for p in causal.parameters()} == {torch.float32}
    assert load_tokenizer(str(tmp_path / "llama")).eos_token_id == 0
    name = roberta(tmp_path / "roberta")
    heads = [load_model(name, "classification", 3, seed).classifier.out_proj.weight for seed in (0, 0, 1)]
    assert heads[0].shape == (3, 16) and torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_loading_leaves_the_generator_alone(tmp_path, rng_untouched):
    load_model(roberta(tmp_path / "roberta"), "classification", 2, seed=3)


def test_without_a_network_a_name_is_refused_at_once_with_what_to_do(no_network, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it asks again"))
    with pytest.raises(ConnectionError) as error:
        load_model("Qwen/Qwen2.5-0.5B")
    said = str(error.value)
    for part in ("Qwen/Qwen2.5-0.5B", "`hf download Qwen/Qwen2.5-0.5B`", "HF_HOME", "cpu-mini", "gpu-offline"):
        assert part in said, said
    with pytest.raises(ConnectionError, match="FacebookAI/roberta-base"):
        load_tokenizer("FacebookAI/roberta-base")


def test_offline_by_setting(monkeypatch, no_network):
    from huggingface_hub import constants

    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: pytest.fail("it asks"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not sources.reachable()
    with pytest.raises(ConnectionError, match="is not in the local cache, and HF_HUB_OFFLINE is set"):
        load_model("owner/name")


@pytest.mark.parametrize(
    "endpoint, proxies, address",
    [
        ("https://huggingface.co", {}, ("huggingface.co", 443)),
        ("http://mirror", {}, ("mirror", 80)),
        ("http://127.0.0.1:8080", {}, ("127.0.0.1", 8080)),
        ("https://[::1]:8443/hub", {}, ("::1", 8443)),
        ("https://mirror", {"HTTPS_PROXY": "http://proxy:3128"}, ("proxy", 3128)),
        ("https://mirror", {"all_proxy": "socks5://user:word@proxy"}, ("proxy", 1080)),
        ("https://mirror", {"https_proxy": "proxy:3128", "no_proxy": "mirror"}, ("mirror", 443)),
        ("http://mirror", {"HTTPS_PROXY": "http://proxy:3128"}, ("mirror", 80)),
    ],
)
def test_the_endpoint_or_the_proxy_on_the_way_is_asked(no_network, monkeypatch, endpoint, proxies, address):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for key, value in proxies.items():
        monkeypatch.setenv(key, value)
    assert not sources.reachable()
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: asked.append(address) or socket.socket())
    assert sources.reachable() and asked == [address]


def test_directories_without_a_model_and_names_that_can_be_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no model of this kind"):
        load_model(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="does not exist, and is no name of a model"):
        load_model(str(tmp_path / "nowhere"))


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
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'pip install datasets, or .* pip install -e "\.\[hub\]"; or name a local csv'
    ):
        load_tables("tuetschek/e2e_nlg")


def test_without_a_network_a_data_set_is_refused_at_once_with_what_to_do(no_network, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: object())
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
