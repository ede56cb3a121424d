"""base_model: the base model that is made without a network."""

import pytest

from lora_ref.course.finetune.base_model import check_packages, make_base, new_model
from lora_ref.course.finetune.preparation import make_accelerator
from lora_ref.course.finetune.profiles import PROFILES, profile
from lora_ref.course.finetune.run_directory import RunDirectory
from lora_ref.course.text.corpus import PACKAGES

SMALL = {
    "base_hidden_size": 16,
    "base_num_layers": 1,
    "base_num_heads": 2,
    "base_steps": 4,
    "base_batch_size": 6,
    "base_length": 16,
}
TINY = profile("gpu-offline", **SMALL, device="cpu", precision="fp32")


def test_the_profiles_base_has_between_30_and_120_million_parameters():
    model = new_model(PROFILES["gpu-offline"].base, "meta")
    assert 30e6 < sum(parameter.numel() for parameter in model.parameters()) < 120e6
    assert next(model.parameters()).is_meta and model.config.vocab_size == 2048


def test_packages_are_checked(refused):
    assert check_packages(TINY.base) == list(PACKAGES)
    refused(lambda: check_packages(profile("gpu-offline", base_packages=["pandas"]).base), "'pandas'", "choose 'all'")


def test_a_base_that_is_there_is_not_made_again_and_too_little_prose_is_refused(tmp_path, monkeypatch, refused):
    from lora_ref.course.finetune import base_model as new_base
    from lora_ref.course.text.corpus import Corpus

    accelerator = make_accelerator(TINY.system)
    place = RunDirectory(tmp_path / "out", "gpu-offline", {})
    place.open().__enter__()
    monkeypatch.setattr(new_base, "load_corpus", lambda packages: Corpus(["a"], []))
    refused(lambda: make_base(TINY.base, place, accelerator, False), "too little prose", "name more")
    texts = [f"This is sentence number {i} of a few." for i in range(40)]
    monkeypatch.setattr(new_base, "load_corpus", lambda packages: Corpus(texts[:30], texts[30:]))
    bits = make_base(TINY.base, place, accelerator, False)
    monkeypatch.setattr(new_base, "load_corpus", lambda packages: pytest.fail("made again"))
    assert make_base(TINY.base, place, accelerator, False) == bits and 0 < bits < 20
    assert not place.checkpoint("base").exists()
