"""course/finetune/profiles.py, config.py: every setting has a range, and the table is what its names promise."""

import pytest
from pydantic import ValidationError

from lora_ref.course.finetune.config import Profile
from lora_ref.course.finetune.profiles import PROFILES, profile


def test_the_profiles_of_the_table_are_there_and_fit_what_they_are_for():
    assert {"cpu-mini", "gpu-hub", "gpu-hub-mrpc", "gpu-hub-sst2", "gpu-offline"} <= set(PROFILES)
    mini, offline = PROFILES["cpu-mini"], PROFILES["gpu-offline"]
    assert {name: own.system.device for name, own in PROFILES.items()} == {
        n: "cpu" if n == "cpu-mini" else "cuda" for n in PROFILES
    }
    assert (mini.base.model, mini.data.dataset) == ("prose_llama", "restaurants")
    assert (mini.system.device, mini.optimisation.arms) == ("cpu", ("full", "r=8"))
    assert offline.base.model == "new"
    assert len(offline.optimisation.seeds) >= 3 and len(offline.optimisation.arms) >= 3
    searched = (len(offline.optimisation.arms) - 1) * len(offline.optimisation.lora_lrs)
    parallel = {name: own.optimisation.parallel_adapters for name, own in PROFILES.items()}
    assert {name: number for name, number in parallel.items() if number > 1} == {"gpu-offline": searched}
    for name, own in PROFILES.items():
        if name.startswith("gpu-hub"):
            assert "/" in own.base.model and "/" in own.data.dataset and own.system.precision == "bf16"
            assert "full" in own.optimisation.arms
        if name != "cpu-mini":
            assert len(own.optimisation.full_lrs) >= 3 and len(own.optimisation.lora_lrs) >= 3, f"{name} has no search"


def test_a_setting_can_be_overridden_and_the_table_stays_as_it_is():
    before = PROFILES["cpu-mini"].model_dump()
    own = profile("cpu-mini", steps=7, arms=["r=3"], lora_alpha=5, base_steps=9)
    assert (own.optimisation.steps, own.optimisation.arms, own.optimisation.batch_size) == (7, ("r=3",), 16)
    assert own.adapter.lora_alpha == 5.0 and isinstance(own.adapter.lora_alpha, float) and own.base.steps == 9
    assert PROFILES["cpu-mini"].model_dump() == before


def test_a_profile_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        PROFILES["cpu-mini"].optimisation.steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        PROFILES["cpu-mini"].data = PROFILES["gpu-hub"].data


def test_a_profile_survives_json():
    for own in PROFILES.values():
        assert Profile.model_validate_json(own.model_dump_json()) == own
        assert Profile.model_validate(own.model_dump(mode="json")) == own


@pytest.mark.parametrize(
    "overrides, says",
    [
        ({"step": 3}, ["no field 'step'", "'steps'"]),
        ({"steps": 1}, ["steps = 1", "at least 2 steps"]),
        ({"steps": 2.5}, ["steps must be int", "2.5"]),
        ({"steps": True}, ["steps must be int", "True"]),
        ({"steps": "3"}, ["steps must be int", "'3'"]),
        ({"lora_alpha": 0}, ["lora_alpha = 0"]),
        ({"lora_alpha": True}, ["lora_alpha must be float", "True"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha = nan"]),
        ({"max_grad_norm": float("inf")}, ["max_grad_norm = inf", "at least 1e-09"]),
        ({"lora_dropout": 1.0}, ["lora_dropout = 1.0", "between 0 and 0.99"]),
        ({"full_lrs": ()}, ["full_lrs must be a list"]),
        ({"full_lrs": 1e-3}, ["full_lrs must be a list", "0.001"]),
        ({"full_lrs": (1e-3, 11)}, ["full_lrs = 11 is out of range", "between 1e-09 and 10"]),
        ({"lora_lrs": (1e-3, 1e-3)}, ["lora_lrs", "twice"]),
        ({"seeds": (0, 3, 0)}, ["seeds", "twice"]),
        ({"seeds": (0, -1)}, ["seeds = -1", "at least 0"]),
        ({"arms": "full"}, ["arms must be a list", "'full'"]),
        ({"arms": ("full", "r=0")}, ["'r=0'", "r=8"]),
        ({"arms": ("r=8\n",)}, ["'r=8\\n'", "r=8"]),
        ({"arms": ("lora",)}, ["'lora'", "'full'"]),
        ({"precision": "bf61"}, ["'bf61'", "'bf16'"]),
        ({"precision": 16}, ["precision must be str", "16"]),
        ({"task": "data2text"}, ["'data2text'", "'data-to-text'"]),
        ({"device": "gpu"}, ["device = 'gpu'", "choose one of 'auto', 'cpu', 'cuda'"]),
        ({"gradient_checkpointing": 1}, ["gradient_checkpointing must be bool", "1"]),
        ({"model": ""}, ["model is empty"]),
        ({"gradient_accumulation_steps": 3}, ["batch_size = 16", "gradient_accumulation_steps = 3", "equal size"]),
        ({"task": "classification"}, ["prose_llama", "classifier"]),
        (
            {"model": "new", "base_hidden_size": 30, "base_num_heads": 4},
            ["base_hidden_size = 30", "2·base_num_heads = 8"],
        ),
        ({"parallel_adapters": 0}, ["parallel_adapters = 0", "at least 1 adapters"]),
        ({"parallel_adapters": 2, "precision": "fp16"}, ["parallel_adapters = 2", "fp16", "parallel_adapters = 1"]),
        (
            {"parallel_adapters": 2, "task": "classification", "model": "roberta-base"},
            ["parallel_adapters = 2", "head", "parallel_adapters = 1"],
        ),
        ({"base_length": 513}, ["base_length = 513", "between 8 and 512"]),
        ({"steps": 1, "device": "gpu"}, ["steps = 1", "device = 'gpu'"]),
    ],
)
def test_bad_settings_are_refused(overrides, says, refused):
    refused(lambda: profile("cpu-mini", **overrides), *says)


def test_unknown_profiles_are_refused_with_near_matches(refused):
    refused(lambda: profile("cpu_mini"), "'cpu_mini' is unknown", "'cpu-mini'")
    refused(lambda: profile("zzz"), "there are cpu-mini, gpu-hub")


def test_the_warm_up_is_a_share_of_the_steps_and_never_all_of_them():
    assert profile("cpu-mini", steps=50, warmup_ratio=0.1).optimisation.warmup_steps == 5
    assert profile("cpu-mini", steps=2, warmup_ratio=0.9).optimisation.warmup_steps == 1
