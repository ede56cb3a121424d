"""course/sweep.py: the table of arms, the search for a rate, what a run measures, the command line."""

import copy
import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ref.course.classifiers import seeded, trainable
from lora_ref.course.experiments import sweep
from lora_ref.course.experiments.record import (
    RECORD,
    SEEDS,
    TRAIN,
    Arm,
    best_rate,
    collect,
    finished,
    results,
    save,
    shipped,
    stem,
    tuned,
    weights,
)
from lora_ref.course.experiments.sweep import ARMS, lora
from lora_ref.course.text.corpus import Prose
from lora_ref.course.text.data_to_text import Scores, batches, encode, held_out_loss, text_loss
from lora_ref.course.text.grammar import examples
from lora_ref.course.text.language_model import language_model
from lora_ref.layers import LoRALayer
from lora_ref.model import lora_layers

SHIPPED, TOKENIZER = language_model()
PAD = TOKENIZER.eos_token_id
DATA, HELD_OUT = sweep.data, sweep.held_out_prose  # the real ones; `tiny` below puts others in their place
BUDGET = 116_736  # r = 8 on every linear layer of the shipped model


def title(arm):
    return f"{arm.experiment}/{arm.name}"


def linear(model):
    """Path → (d, k) of the linear layers of the blocks."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in path}
    return {path: tuple(m.weight.shape) for path, m in layers.items()}


# the table


@pytest.fixture(scope="module")
def built():
    """title → the shipped model as the arm begins (its start left aside), a build for each adapter."""
    models = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "language_model", lambda: (copy.deepcopy(SHIPPED), TOKENIZER))
        for arm in ARMS:
            key = json.dumps([arm.adapter, arm.trains])
            if key not in models:
                models[key] = sweep.begin(replace(arm, start="prose_llama"), 0)[0]
    return {title(arm): models[json.dumps([arm.adapter, arm.trains])] for arm in ARMS}


def test_arms_have_names_of_their_own_and_their_runs_do_too(tmp_path):
    assert len({title(arm) for arm in ARMS}) == len({stem(arm) for arm in ARMS}) == len(ARMS)
    (tmp_path / "runs").mkdir()
    for i, arm in enumerate(ARMS):
        save(tmp_path, arm, {"seed": 0, "rate": 0.001, "validation": i})
        assert not set(stem(arm)) & set('/\\:*?"<>|[] ')
    for i, arm in enumerate(ARMS):
        assert results(tmp_path, arm) == {(0, 0.001): {"seed": 0, "rate": 0.001, "validation": i}}


@pytest.mark.parametrize("arm", ARMS, ids=title)
def test_every_arm_builds_and_begins_its_search_on_the_grid(arm, built):
    model, every = built[title(arm)], sum(p.numel() for p in SHIPPED.parameters())
    if arm.adapter is not None:
        assert 0 < trainable(model) < every and arm.trains == ""
        assert {layer.scale for layer in lora_layers(model).values()} == {
            4.0 if "rank_pattern" in arm.adapter else 32 / arm.adapter["r"]
        }
    elif arm.trains:
        assert trainable(model) == sum(d * k for d, k in linear(SHIPPED).values())
    else:
        assert trainable(model) == every
    steps = math.log2(arm.first_rate / (sweep.FULL if arm.adapter is None else sweep.LORA))
    assert steps == round(steps) and arm.steps >= 10 and arm.batch <= arm.n <= TRAIN


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.experiment in ("placement", "layers")], ids=title)
def test_placements_and_layers_share_one_budget(arm, built):
    assert abs(trainable(built[title(arm)]) / BUDGET - 1) < 0.03
    adapted = {path.rsplit(".", 1)[1] for path in lora_layers(built[title(arm)])}
    assert adapted == set(arm.adapter["target_modules"])
    if arm.experiment == "placement":
        names = {"MLP": sweep.MLP} | {letter: [f"{letter}_proj"] for letter in "qkvo"}
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


def test_arms_start_from_a_model_from_nothing_or_from_a_full_arm_of_the_table_that_keeps_its_weights():
    known = {title(arm): (i, arm) for i, arm in enumerate(ARMS)}
    for i, arm in enumerate(ARMS):
        if arm.start not in ("prose_llama", "random"):
            at, source = known[arm.start]
            assert source.adapter is None and source.report and at < i


def test_arms_that_are_compared_see_equally_many_examples():
    for experiment in ("rank", "placement", "layers", "batch", "few examples"):
        assert len({arm.steps * arm.batch for arm in ARMS if arm.experiment == experiment}) == 1, experiment


def test_named_finds_an_arm_or_says_which_there_are():
    assert all(sweep.named(arm.experiment, arm.name) is arm for arm in ARMS)
    with pytest.raises(LookupError, match=r"no arm 'r = 3' in 'rank'; it has 'r = 8', 'r = 1'"):
        sweep.named("rank", "r = 3")
    with pytest.raises(LookupError, match="there is no such experiment"):
        sweep.named("ranks", "r = 8")


# the data


@pytest.mark.parametrize("domain", ["restaurants", "weather"])
def test_data_comes_in_three_parts_that_share_no_record(domain):
    parts = DATA(domain)
    assert {part: len(found) for part, found in parts.items()} == {"train": 2000, "validation": 100, "test": 200}
    found = [example for part in parts.values() for example in part]
    assert len({example.meaning for example in found}) == 2300
    assert {(example.domain, len(example.texts)) for example in found} == {(domain, 4)}
    assert DATA(domain) is parts


def test_losses_are_of_the_first_text():
    found = examples("weather", 3, texts=4)
    rows = sweep.rows_of(TOKENIZER, found)
    assert [TOKENIZER.decode(row.ids[row.prompt : -1]) for row in rows] == [example.texts[0] for example in found]


def test_the_held_out_prose_is_of_four_packages(monkeypatch):
    asked = []

    def prose(packages):
        asked.append(packages)
        return Prose(["trained on"], ["held out"])

    monkeypatch.setattr(sweep, "prose", prose)
    HELD_OUT.cache_clear()
    assert HELD_OUT() == HELD_OUT() == ["held out"]
    HELD_OUT.cache_clear()
    assert asked == [["accelerate", "huggingface_hub", "IPython", "matplotlib"]]


def test_prose_bits_count_every_byte_and_an_end_for_each_text(monkeypatch):
    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 2048)})

    texts = ["A matrix has rows.", "Ünïcode takes more bytes than letters."]
    monkeypatch.setattr(sweep, "held_out_prose", lambda: texts)
    tokens = sum(len(TOKENIZER(text)["input_ids"]) + 1 for text in texts)
    size = sum(len(text.encode()) + 1 for text in texts)
    assert sweep.prose_bits(Uniform(), TOKENIZER) == pytest.approx((tokens - 1) * 11 / size, rel=1e-6)


# the search for a rate

ARM = Arm("rank", "r = 8", lora(8), 8e-3)


class Faked:
    """A run whose validation loss is a U over log₂(rate), lowest at `best`; `breaks`: the call that is interrupted."""

    def __init__(self, best, diverges=math.inf, breaks=None):
        self.best, self.diverges, self.breaks, self.calls = best, diverges, breaks, []

    def __call__(self, arm, seed, rate, directory):
        if len(self.calls) == self.breaks:
            self.breaks = None
            raise KeyboardInterrupt
        self.calls.append((seed, rate))
        # the other seeds prefer another rate: they have no say
        loss = abs(math.log2(rate / self.best)) if seed == 0 else abs(math.log2(rate / self.best / 4))
        loss = math.inf if rate >= self.diverges else loss
        return {"seed": seed, "rate": rate, "validation": loss, "test": loss + 1}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    def install(*args, **more):
        faked = Faked(*args, **more)
        monkeypatch.setattr(sweep, "run", faked)
        return faked, tmp_path

    (tmp_path / "runs").mkdir()
    return install


@pytest.mark.parametrize("away", [-5, -2, -1, 0, 1, 3, 6])
def test_tune_finds_the_best_rate_with_both_neighbours_then_runs_the_other_seeds_there(away, fake):
    best = ARM.first_rate * 2.0**away
    run, directory = fake(best)
    sweep.tune(ARM, directory)
    first = [rate for seed, rate in run.calls if seed == 0]
    low, high = min(away, 0) - (away <= 0), max(away, 0) + 1
    assert first[0] == ARM.first_rate and len(first) == len(set(first))
    span = {round(math.log2(rate / ARM.first_rate)) for rate in first}
    assert {away - 1, away, away + 1} <= span <= set(range(low, high + 1)) and len(first) == len(span)
    assert run.calls[len(first) :] == [(1, best), (2, best)]
    runs = results(directory, ARM)
    assert best_rate(runs) == best and finished(runs) and set(runs) == set(run.calls)
    assert runs[0, best] == {"seed": 0, "rate": best, "validation": 0, "test": 1}
    before = len(run.calls)
    sweep.tune(ARM, directory)
    assert len(run.calls) == before  # all is there


@pytest.mark.parametrize("stop", range(6))
def test_an_interrupted_search_goes_on_without_repeating_a_run(stop, fake):
    run, directory = fake(ARM.first_rate * 4, breaks=stop)
    (directory / "runs" / "rank-r__8-0-0.5.part").write_text('{"seed": 0, "ra')  # of a crash while writing
    with pytest.raises(KeyboardInterrupt):
        sweep.tune(ARM, directory)
    assert len(run.calls) == stop == len(results(directory, ARM))
    assert not finished(results(directory, ARM))
    sweep.tune(ARM, directory)
    whole, elsewhere = fake(ARM.first_rate * 4)
    shutil.rmtree(elsewhere / "runs")
    (elsewhere / "runs").mkdir()
    sweep.tune(ARM, elsewhere)
    assert run.calls == whole.calls and len(set(run.calls)) == len(run.calls) == 6


def test_a_run_whose_file_was_not_yet_whole_does_not_count(fake, monkeypatch):
    run, directory = fake(ARM.first_rate)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", crash)
        sweep.tune(ARM, directory)
    assert results(directory, ARM) == {}
    sweep.tune(ARM, directory)
    assert run.calls.count((0, ARM.first_rate)) == 2 and finished(results(directory, ARM))


@pytest.mark.parametrize("diverges", [2.0, 1.0, 0.25])
def test_rates_that_diverge_are_worse_than_any_other(diverges, fake):
    run, directory = fake(ARM.first_rate / 8, diverges=ARM.first_rate * diverges)
    sweep.tune(ARM, directory)
    runs = results(directory, ARM)
    assert best_rate(runs) == ARM.first_rate / 8 and finished(runs)
    lost = [found for found in runs.values() if found["rate"] >= ARM.first_rate * diverges]
    assert lost and all(found["validation"] == found["test"] == math.inf for found in lost)


# one run, in miniature


@pytest.fixture(scope="module")
def tiny():
    """A random Llama without a square matrix, a few examples, two sentences of prose, in place of the real ones."""
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True}
    ends = {"eos_token_id": PAD, "pad_token_id": PAD, "bos_token_id": PAD}
    model = seeded(0, lambda: LlamaForCausalLM(LlamaConfig(**sizes | heads | ends))).eval()
    parts = {}
    for domain in ("restaurants", "weather"):
        found = examples(domain, 36, seed=5, texts=2)
        parts[domain] = {"train": found[:24], "validation": found[24:32], "test": found[32:]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "language_model", lambda: (copy.deepcopy(model), TOKENIZER))
        patch.setattr(sweep, "data", parts.__getitem__)
        patch.setattr(sweep, "held_out_prose", lambda: ["A matrix has rows and columns.", "It returns a value."])
        yield model


def no_texts(seen):
    """In place of `scores`, which takes time: keeps the model that would have written."""

    def scores(model, tokenizer, found):
        seen.append(model)
        return Scores(0.0, 12.5, 0.25, [example.texts[0] for example in found])

    return scores


@pytest.fixture
def quick(monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "scores", no_texts(seen))
    return seen


def rows(domain, part):
    return encode(TOKENIZER, [replace(example, texts=example.texts[:1]) for example in sweep.data(domain)[part]])


ADAPTER = Arm("tasks", "r = 8", lora(8), 1e-2, steps=3, batch=2)
WHOLE = Arm("tasks", "full", None, 1e-3, steps=3, batch=2)


@pytest.fixture(scope="module")
def adapted(tiny):
    return sweep.run(ADAPTER, 1, 1e-2)


def test_an_adapter_arm_begins_as_the_base_and_trains_its_factors_alone(adapted, tiny):
    assert adapted["trained"] == 8 * sum(d + k for d, k in linear(tiny).values())
    assert adapted["all"] == adapted["trained"] + sum(p.numel() for p in tiny.parameters())
    train, plan = rows("restaurants", "train"), batches(rows("restaurants", "train"), 2, 3, 1)
    first = text_loss(tiny, [train[i] for i in plan[0]], PAD).item()
    assert adapted["losses"][0] == pytest.approx(first, abs=1e-4) and len(adapted["losses"]) == 3
    curve = adapted["curve"]
    assert [point["step"] for point in curve] == [0, 1, 2, 3]
    assert curve[0]["validation"] == pytest.approx(
        held_out_loss(tiny, rows("restaurants", "validation"), PAD), abs=1e-4
    )
    assert curve[-1]["validation"] == round(adapted["validation"], 5) < curve[0]["validation"]
    assert all(set(point) == {"step", "validation"} for point in curve)
    assert (adapted["seed"], adapted["rate"]) == (1, 1e-2) and math.isfinite(adapted["test"])
    names = {"seed", "rate", "trained", "all", "curve", "validation", "test", "losses", "seconds"}
    assert set(adapted) == names and json.loads(json.dumps(adapted)) == adapted


def test_the_same_seed_gives_the_same_run_and_another_seed_another(adapted, tiny):
    def measured(run):
        return {key: value for key, value in run.items() if key != "seconds"}

    torch.rand(3)  # what was drawn before is of no account
    assert measured(sweep.run(ADAPTER, 1, 1e-2)) == measured(adapted)
    other = sweep.run(ADAPTER, 2, 1e-2)
    assert other["losses"] != adapted["losses"] and other["test"] != adapted["test"]


def by_hand(model, arm, seed, rate):
    """Training spelt out: AdamW, the gradient clipped at 1, the rate falling in a line to 0."""
    train = rows(arm.domain, "train")[: arm.n]
    plan = batches(train, arm.batch, arm.steps, seed)
    trained = [p for name, p in model.named_parameters() if not arm.trains or name.endswith("_proj.weight")]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for t in range(arm.steps):
        optimizer.param_groups[0]["lr"] = rate * (arm.steps - t) / arm.steps
        model.zero_grad()
        text_loss(model, [train[i] for i in plan[t]], PAD).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "arm",
    [WHOLE, replace(WHOLE, trains=r".*_proj\.weight"), replace(WHOLE, n=5)],
    ids=["all", "linear layers", "five examples"],
)
def test_full_arms_train_as_spelt_out_by_hand(arm, tiny):
    found, model = sweep.run(arm, 0, 2e-3), by_hand(copy.deepcopy(tiny), arm, 0, 2e-3)
    for part in ("validation", "test"):
        assert found[part] == pytest.approx(held_out_loss(model, rows("restaurants", part), PAD), abs=1e-5)
    every = sum(p.numel() for p in tiny.parameters())
    assert found["trained"] == (sum(d * k for d, k in linear(tiny).values()) if arm.trains else every)
    assert found["all"] == every
    own = held_out_loss(model, rows("restaurants", "train")[:5], PAD)
    assert [point.get("train") for point in found["curve"]][-1] == (
        pytest.approx(own, abs=1e-4) if arm.n == 5 else None
    )


def test_a_run_that_diverges_says_so(tiny):
    found = sweep.run(WHOLE, 0, 1e30)
    assert found["validation"] == found["test"] == math.inf
    assert set(found) == {"seed", "rate", "trained", "all", "validation", "test"}


def test_a_run_whose_last_step_diverges_says_so_too(tiny, monkeypatch):
    monkeypatch.setattr(sweep, "held_out_loss", lambda *_: math.nan)  # where the losses of all steps were finite
    found = sweep.run(replace(WHOLE, steps=1), 0, 1e-3)
    assert found["validation"] == found["test"] == math.inf and "curve" not in found


def test_a_random_start_depends_on_the_seed_alone(tiny, rng_untouched):
    arm = replace(WHOLE, start="random")
    expected = seeded(4, lambda: LlamaForCausalLM(tiny.config)).state_dict()
    found = sweep.begin(arm, 4)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(sweep.begin(arm, 5)[0].state_dict()["lm_head.weight"], expected["lm_head.weight"])


def test_an_adapter_begins_as_its_seed_says(tiny, rng_untouched):
    first, again, other = (lora_layers(sweep.begin(ADAPTER, seed)[0]) for seed in (1, 1, 2))
    for path, layer in first.items():
        assert torch.equal(layer.lora_A, again[path].lora_A) and not torch.equal(layer.lora_A, other[path].lora_A)
        assert not layer.lora_B.any()


SOURCE, LOW = replace(WHOLE, report=True), replace(ADAPTER, report=True)


@pytest.fixture(scope="module")
def whole_sweep(tiny, tmp_path_factory):
    """A directory with finished runs of two arms that keep their weights; the third seed's are the second's again."""
    directory = tmp_path_factory.mktemp("sweep")
    for part in ("runs", "weights"):
        (directory / part).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "scores", no_texts([]))
        for arm in (SOURCE, LOW):
            for seed in (0, 1):
                found = sweep.run(arm, seed, 4e-3, directory)
                save(directory, arm, found)
            save(directory, arm, found | {"seed": 2})
            shutil.copy(weights(directory, arm, 1, 4e-3), weights(directory, arm, 2, 4e-3))
    return directory


@pytest.fixture
def swept(whole_sweep, monkeypatch, tmp_path):
    """A copy of it, and the table reduced to its two arms."""
    monkeypatch.setattr(sweep, "ARMS", [SOURCE, LOW])
    return shutil.copytree(whole_sweep, tmp_path / "sweep")


def test_an_arm_begins_with_the_weights_of_the_same_seed_that_another_kept(swept, tiny, quick):
    after = Arm("tasks", "then weather", None, 1e-3, 3, 2, domain="weather", start="tasks/full", report=True)
    for seed in SEEDS:
        kept = results(swept, SOURCE)[seed, 4e-3]["validation"]
        model, _ = sweep.begin(after, seed, swept)
        assert held_out_loss(model, rows("restaurants", "validation"), PAD) == pytest.approx(kept, abs=1e-6)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert results(swept, SOURCE)[0, 4e-3]["validation"] != kept
    found = sweep.run(after, 1, 1e-3, swept)
    assert found["curve"][0]["restaurants"] == pytest.approx(kept, abs=1e-4)
    assert set(found["curve"][0]) == {"step", "validation", "prose", "restaurants"}
    adapter = sweep.begin(replace(after, adapter=lora(4)), 1, swept)[0]
    assert held_out_loss(adapter, rows("restaurants", "validation"), PAD) == pytest.approx(kept, abs=1e-6)


def test_an_arm_whose_start_has_not_finished_is_refused(swept, refused):
    after = Arm("tasks", "then weather", None, 1e-3, start="tasks/full")
    (swept / "runs" / f"{stem(SOURCE)}-2-0.004.json").unlink()
    for where in (None, swept, swept / "weights"):
        refused(lambda: sweep.begin(after, 0, where), "tasks/then weather", "tasks/full", "not finished", str(where))
    with pytest.raises(LookupError, match="'tasks'; it has 'full'"):
        sweep.begin(replace(after, start="tasks/none"), 0, swept)


def test_a_report_keeps_what_was_trained_and_judges_the_merged_model(tiny, quick, tmp_path):
    (tmp_path / "weights").mkdir()
    for arm in (replace(ADAPTER, report=True), replace(WHOLE, trains=r".*_proj\.weight", report=True)):
        found = sweep.run(arm, 0, 5e-3, tmp_path)
        kept = load_file(weights(tmp_path, arm, 0, 5e-3))
        assert sum(p.numel() for p in kept.values()) == found["trained"]
        ends = ("lora_A", "lora_B") if arm.adapter else ("_proj.weight",)
        assert all(name.endswith(ends) for name in kept) and len(kept) == len(ends) * len(linear(tiny))
        model = quick.pop()
        assert all(module.merged for module in model.modules() if isinstance(module, LoRALayer))
        loss = held_out_loss(model, rows("restaurants", "validation"), PAD)
        assert loss == pytest.approx(found["validation"], abs=1e-5)
        assert (found["bleu"], found["slot_errors"]) == (12.5, 0.25)
        assert found["texts"] == [example.texts[0] for example in sweep.data("restaurants")["test"]][:8]
        assert [point["step"] for point in found["curve"]] == [0, 1, 2, 3]
        assert all(set(point) == {"step", "validation", "prose"} for point in found["curve"])


def test_a_report_writes_texts_and_without_a_directory_keeps_no_weights(tiny, monkeypatch):
    monkeypatch.setattr(sweep, "save_file", None)
    found = sweep.run(replace(WHOLE, steps=1, report=True), 0, 1e-3)
    assert len(found["texts"]) == 4 and 0 <= found["bleu"] <= 100 and found["slot_errors"] >= 0
    assert found["curve"][0]["prose"] == pytest.approx(sweep.prose_bits(tiny, TOKENIZER), abs=1e-4)


def test_updates_come_from_the_weights_that_were_kept(swept, tiny):
    for arm in (SOURCE, LOW):
        found, state = sweep.updates_of(arm, 1, swept), tiny.state_dict()
        kept = load_file(weights(swept, arm, 1, 4e-3))
        assert set(found) == set(linear(tiny))
        for path, (W0, dW) in found.items():
            assert torch.equal(W0, state[f"{path}.weight"])
            update = (
                kept[f"{path}.weight"] - W0
                if arm.adapter is None
                else 4 * kept[f"{path}.lora_B"] @ kept[f"{path}.lora_A"]
            )
            assert dW.any() and torch.allclose(dW, update, atol=1e-7)


def test_the_record_has_a_mean_over_matrices_for_each_seed_and_pair(swept):
    found = collect(sweep.ARMS, swept, sweep.updates_of)
    assert list(found["anatomy"]) == ["full", "r = 8"]
    for seeds in found["anatomy"].values():
        assert len(seeds) == 3 and seeds[1] == seeds[2] != seeds[0]
        assert all(math.isfinite(value) for seed in seeds for value in seed.values())
    sizes = [(dW.norm() / W0.norm()).item() for W0, dW in sweep.updates_of(LOW, 0, swept).values()]
    assert found["anatomy"]["r = 8"][0]["size"] == pytest.approx(sum(sizes) / len(sizes))
    for name in ("full, two seeds", "r = 8, two seeds"):
        first, second, same = found["overlap"][name]
        assert first == second and same["left"] == pytest.approx(1, abs=1e-4) and first["left"] < 0.99
    assert len(found["overlap"]["full and r = 8"]) == 3


# the record


def test_collect_takes_finished_arms_alone_and_writes_strict_json(fake, tmp_path, monkeypatch):
    done, lost, half = ARMS[0], ARMS[7], ARMS[1]
    for arm, diverges in ((done, math.inf), (lost, lost.first_rate * 2)):
        run, directory = fake(arm.first_rate, diverges=diverges)
        sweep.tune(arm, directory)
    for seed in (0, 1):
        save(tmp_path, half, {"seed": seed, "rate": 8e-3, "validation": 1.0, "test": 1.0})
    monkeypatch.setattr(sweep, "tune", None)  # nothing is run
    target = tmp_path / "record.json"
    assert sweep.main(["--output", str(tmp_path), "--collect", str(target)]) == 0
    record = json.loads(target.read_text(), parse_constant=pytest.fail)  # Infinity and NaN are no JSON
    assert {name: list(arms) for name, arms in record["experiments"].items()} == {"rank": ["r = 8", "full"]}
    first, second = record["experiments"]["rank"].values()
    assert first["best_rate"] == done.first_rate and second["best_rate"] == lost.first_rate
    assert [(run["seed"], run["rate"]) for run in first["runs"]] == [
        (0, 4e-3), (0, 8e-3), (0, 16e-3), (1, 8e-3), (2, 8e-3)
    ]  # fmt: skip
    assert [run["validation"] for run in second["runs"] if run["rate"] > lost.first_rate] == [None]
    settings = {key: first[key] for key in first if key not in ("best_rate", "runs")}
    assert Arm(done.experiment, done.name, **settings) == done
    assert record["made with"]["seeds"] == [0, 1, 2] and record["made with"]["torch"] == torch.__version__
    assert all(record["made with"].values()) and len(record["made with"]) == 6
    assert not list(tmp_path.glob(".*"))


def test_a_record_that_would_not_be_json_is_not_written_and_the_old_one_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    for seed in SEEDS:
        found = {"seed": seed, "rate": 8e-3, "validation": 1.0, "test": 1.0, "curve": [{"step": 0, "train": math.nan}]}
        (tmp_path / "runs" / f"{stem(ARM)}-{seed}-0.008.json").write_text(json.dumps(found))
    (tmp_path / "record.json").write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        sweep.main(["--output", str(tmp_path), "--collect", str(tmp_path / "record.json")])
    assert (tmp_path / "record.json").read_text() == "old"


SHIPPED_RECORD = shipped() if RECORD.exists() else {}


@pytest.mark.parametrize("experiment, name", [(e, name) for e, arms in SHIPPED_RECORD.items() for name in arms])
def test_the_shipped_record_is_of_this_table_tuned_and_whole(experiment, name, built):
    found, arm = SHIPPED_RECORD[experiment][name], sweep.named(experiment, name)
    settings = {key: value for key, value in found.items() if key not in ("best_rate", "runs")}
    assert Arm(experiment, name, **settings) == arm and set(settings) == set(vars(arm)) - {"experiment", "name"}
    best, runs = found["best_rate"], {(run["seed"], run["rate"]): run for run in found["runs"]}
    assert len(runs) == len(found["runs"]) and tuned(found, "seed") == list(SEEDS)
    losses = {rate: run["validation"] for (seed, rate), run in runs.items() if seed == 0}
    losses = {rate: math.inf if loss is None else loss for rate, loss in losses.items()}
    assert {best / 2, best * 2, arm.first_rate} <= set(losses)
    assert losses[best] == min(losses.values()) < min(losses[best / 2], losses[best * 2])
    for seed in SEEDS:
        run = runs[seed, best]
        assert run["trained"] == trainable(built[f"{experiment}/{name}"]) <= run["all"]
        assert len(run["losses"]) == arm.steps
        assert (run["curve"][0]["step"], run["curve"][-1]["step"]) == (0, arm.steps)
        assert run["curve"][-1]["validation"] == pytest.approx(run["validation"], abs=1e-5)
        assert all(math.isfinite(value) and value > 0 for value in [*run["losses"], run["validation"], run["test"]])
        assert run["validation"] < run["curve"][0]["validation"]
        if arm.report:
            assert 0 <= run["bleu"] <= 100 and 0 <= run["slot_errors"] and len(run["texts"]) == 8
            assert all(point["prose"] > 0 for point in run["curve"])
        assert ("train" in run["curve"][0]) == (arm.n < TRAIN)


# the command line


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
def test_the_parts_share_every_arm_once_in_order(n, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweep, "tune", lambda arm, directory: seen.append((arm, directory)))
    for i in range(n):
        before = len(seen)
        assert sweep.main(["--output", str(tmp_path / "new"), "--part", f"{i}/{n}"]) == 0
        order = [ARMS.index(arm) for arm, _ in seen[before:]]
        assert order == sorted(order)
    assert sorted(ARMS.index(arm) for arm, _ in seen) == list(range(len(ARMS)))
    assert {directory for _, directory in seen} == {tmp_path / "new"}
    assert (tmp_path / "new" / "runs").is_dir() and (tmp_path / "new" / "weights").is_dir()


def test_without_a_part_all_arms_run(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweep, "tune", lambda arm, directory: seen.append(arm))
    sweep.main(["--output", str(tmp_path)])
    assert seen == ARMS


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], ["--output"]),
        (["--output", "{new}", "--part", "2/2"], ["--part", "'2/2'", "0 <= i < n"]),
        (["--output", "{new}", "--part", "x"], ["--part", "'x'", "such as 0/2"]),
        (["--output", "{new}", "--part=-1/2"], ["--part", "'-1/2'"]),
        (["--output", "{new}", "--part", "0/0"], ["--part", "'0/0'"]),
        (["--output", "{new}", "--part", "1"], ["--part", "'1'"]),
        (["--output", "{new}", "--part", "0.5/2"], ["--part", "'0.5/2'"]),
        (["--output", "{file}"], ["--output", "file.txt is a file; name a directory"]),
        (["--output", "{file}/below"], ["--output", "file.txt is a file; name a directory"]),
        (["--output", "{new}", "--collect", "{there}"], ["--collect", "name a file"]),
        (["--output", "{new}", "--collect", "{new}/record.json"], ["--collect", "a directory that exists"]),
        (["--output", "{new}", "--collect", "{there}/record.json"], ["--output", "no finished arm"]),
        (["--output", "{there}", "--collect", "{file}"], ["--output", "no finished arm"]),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2_and_change_nothing(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "tune", None)
    (tmp_path / "file.txt").write_text("kept")
    names = {"new": tmp_path / "new", "file": tmp_path / "file.txt", "there": tmp_path}
    with pytest.raises(SystemExit) as stop:
        sweep.main([word.format(**names) for word in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(part in error for part in says), error
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "kept"
