"""course/sources.py: models from directories and by Hub name, and what is said without a network."""

import socket
import time

import pytest
import torch

from lora_ref.course.finetune import hub as sources
from lora_ref.course.finetune.hub import load_model, load_tokenizer
from tests.course.finetune.tiny_models import llama, roberta


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
