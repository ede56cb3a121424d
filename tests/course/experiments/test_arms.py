"""course/experiments/arms.py: the table of arms: names, budgets, where the searches begin."""

import math

import pytest

from lora_ref.course.classifiers import trainable
from lora_ref.course.experiments.arms import ARMS, FULL_LR, LORA_LR, MLP, TRAIN_EXAMPLES, find_arm
from lora_ref.course.experiments.run_files import file_stem, load_runs, save_run
from lora_ref.model import lora_layers

from .arm_models import SHIPPED, linear, title

BUDGET = 116_736  # r = 8 on every linear layer of the shipped model


def test_arms_have_names_of_their_own_and_their_runs_do_too(tmp_path):
    assert len({title(arm) for arm in ARMS}) == len({file_stem(arm) for arm in ARMS}) == len(ARMS)
    (tmp_path / "runs").mkdir()
    for i, arm in enumerate(ARMS):
        save_run(tmp_path, arm, {"seed": 0, "lr": 0.001, "validation": i})
        assert not set(file_stem(arm)) & set('/\\:*?"<>|[] ')
    for i, arm in enumerate(ARMS):
        assert load_runs(tmp_path, arm) == {(0, 0.001): {"seed": 0, "lr": 0.001, "validation": i}}


@pytest.mark.parametrize("arm", ARMS, ids=title)
def test_every_arm_builds_and_its_search_begins_on_the_grid(arm, built):
    model, every = built[title(arm)], sum(p.numel() for p in SHIPPED.parameters())
    if arm.adapter is not None:
        assert 0 < trainable(model) < every and arm.trainable_pattern == ""
        assert {layer.scale for layer in lora_layers(model).values()} == {
            4.0 if "rank_pattern" in arm.adapter else 32 / arm.adapter["r"]
        }
    elif arm.trainable_pattern:
        assert trainable(model) == sum(d * k for d, k in linear(SHIPPED).values())
    else:
        assert trainable(model) == every
    steps = math.log2(arm.initial_lr / (FULL_LR if arm.adapter is None else LORA_LR))
    assert steps == round(steps) and arm.steps >= 10 and arm.batch_size <= arm.train_examples <= TRAIN_EXAMPLES


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.experiment in ("placement", "layers")], ids=title)
def test_placements_and_layers_share_one_budget(arm, built):
    assert abs(trainable(built[title(arm)]) / BUDGET - 1) < 0.03
    adapted = {path.rsplit(".", 1)[1] for path in lora_layers(built[title(arm)])}
    assert adapted == set(arm.adapter["target_modules"])
    if arm.experiment == "placement":
        names = {"MLP": MLP} | {letter: [f"{letter}_proj"] for letter in "qkvo"}
        assert adapted == {name for word in arm.name.split(", ") for name in names[word]}


def test_the_budget_is_that_of_r_8_and_ranks_cost_in_proportion(built):
    cost = sum(d + k for d, k in linear(SHIPPED).values())
    assert 8 * cost == BUDGET
    ranks = [arm for arm in ARMS if arm.experiment == "rank" and arm.adapter]
    assert sorted(arm.adapter["r"] for arm in ranks) == [1, 2, 4, 8, 16, 32, 64]
    for arm in ranks:
        assert arm.name == f"r = {arm.adapter['r']}" and trainable(built[title(arm)]) == arm.adapter["r"] * cost


@pytest.mark.parametrize("name, attention, mlp", [("more in attention", 16, 2), ("more in the MLP", 2, 12)])
def test_patterns_of_ranks_reach_the_layers_that_their_name_says(name, attention, mlp, built):
    for path, layer in lora_layers(built[f"layers/{name}"]).items():
        assert layer.lora_A.shape[0] == (attention if "self_attn" in path else mlp), path


def test_arms_begin_with_the_shipped_model_a_random_one_or_a_full_arm_of_the_table_that_saves_its_weights():
    known = {title(arm): (i, arm) for i, arm in enumerate(ARMS)}
    for i, arm in enumerate(ARMS):
        if arm.initial_weights not in ("prose_llama", "random"):
            at, source = known[arm.initial_weights]
            assert source.adapter is None and source.report and at < i


def test_arms_that_are_compared_see_equally_many_examples():
    for experiment in ("rank", "placement", "layers", "batch", "few examples"):
        assert len({arm.steps * arm.batch_size for arm in ARMS if arm.experiment == experiment}) == 1, experiment


def test_find_arm_finds_an_arm_or_says_which_there_are():
    assert all(find_arm(arm.experiment, arm.name) is arm for arm in ARMS)
    with pytest.raises(LookupError, match=r"no arm 'r = 3' in 'rank'; it has 'r = 8', 'r = 1'"):
        find_arm("rank", "r = 3")
    with pytest.raises(LookupError, match="there is no such experiment"):
        find_arm("ranks", "r = 8")
