"""course/experiments/training_run.py: an arm's data and model, and what a run measures."""

import copy
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ref.course.classifiers import seeded
from lora_ref.course.experiments import arms, training_run
from lora_ref.course.experiments.arms import SEEDS, Arm, lora
from lora_ref.course.experiments.record import collect
from lora_ref.course.experiments.run_files import file_stem, load_runs, save_run, weights_path
from lora_ref.course.experiments.training_run import (
    build_model,
    encode_first_texts,
    prose_bits,
    run_arm,
    updates_of,
)
from lora_ref.course.text.corpus import Corpus
from lora_ref.course.text.data_to_text import batches, encode, held_out_loss, text_loss
from lora_ref.course.text.evaluation import Scores
from lora_ref.course.text.grammar import examples
from lora_ref.layers import LoRALayer
from lora_ref.model import lora_layers

from .arm_models import TOKENIZER, linear

PAD = TOKENIZER.eos_token_id
LOAD_SPLITS, HELD_OUT = training_run.load_splits, training_run.held_out_prose  # `tiny` below replaces them


# the data


@pytest.mark.parametrize("domain", ["restaurants", "weather"])
def test_data_comes_in_three_parts_that_share_no_record(domain):
    parts = LOAD_SPLITS(domain)
    assert {part: len(found) for part, found in parts.items()} == {"train": 2000, "validation": 100, "test": 200}
    found = [example for part in parts.values() for example in part]
    assert len({example.meaning for example in found}) == 2300
    assert {(example.domain, len(example.texts)) for example in found} == {(domain, 4)}
    assert LOAD_SPLITS(domain) is parts


def test_losses_are_of_the_first_text():
    found = examples("weather", 3, texts=4)
    rows = encode_first_texts(TOKENIZER, found)
    assert [TOKENIZER.decode(row.ids[row.prompt_length : -1]) for row in rows] == [
        example.texts[0] for example in found
    ]


def test_the_held_out_prose_is_of_four_packages(monkeypatch):
    requested = []

    def load(packages):
        requested.append(packages)
        return Corpus(["trained on"], ["held out"])

    monkeypatch.setattr(training_run, "load_corpus", load)
    HELD_OUT.cache_clear()
    assert HELD_OUT() == HELD_OUT() == ["held out"]
    HELD_OUT.cache_clear()
    assert requested == [["accelerate", "huggingface_hub", "IPython", "matplotlib"]]


def test_prose_bits_count_every_byte_and_an_end_for_each_text(monkeypatch):
    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 2048)})

    texts = ["A matrix has rows.", "Ünïcode takes more bytes than letters."]
    monkeypatch.setattr(training_run, "held_out_prose", lambda: texts)
    tokens = sum(len(TOKENIZER(text)["input_ids"]) + 1 for text in texts)
    size = sum(len(text.encode()) + 1 for text in texts)
    assert prose_bits(Uniform(), TOKENIZER) == pytest.approx((tokens - 1) * 11 / size, rel=1e-6)


# one run, in miniature


@pytest.fixture(scope="module")
def tiny():
    """A random Llama without a square matrix, a few examples, two sentences of prose, instead of the real ones."""
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True}
    ends = {"eos_token_id": PAD, "pad_token_id": PAD, "bos_token_id": PAD}
    model = seeded(0, lambda: LlamaForCausalLM(LlamaConfig(**sizes | heads | ends))).eval()
    parts = {}
    for domain in ("restaurants", "weather"):
        found = examples(domain, 36, seed=5, texts=2)
        parts[domain] = {"train": found[:24], "validation": found[24:32], "test": found[32:]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "language_model", lambda: (copy.deepcopy(model), TOKENIZER))
        patch.setattr(training_run, "load_splits", parts.__getitem__)
        patch.setattr(training_run, "held_out_prose", lambda: ["A matrix has rows and columns.", "It returns a value."])
        yield model


def no_texts(seen):
    """In place of `scores`, which takes time: collects the model that would have generated."""

    def scores(model, tokenizer, found):
        seen.append(model)
        return Scores(0.0, 12.5, 0.25, [example.texts[0] for example in found])

    return scores


@pytest.fixture
def quick(monkeypatch):
    seen = []
    monkeypatch.setattr(training_run, "scores", no_texts(seen))
    return seen


def rows(domain, part):
    return encode(
        TOKENIZER, [replace(example, texts=example.texts[:1]) for example in training_run.load_splits(domain)[part]]
    )


ADAPTER = Arm("tasks", "r = 8", lora(8), 1e-2, steps=3, batch_size=2)
WHOLE = Arm("tasks", "full", None, 1e-3, steps=3, batch_size=2)


@pytest.fixture(scope="module")
def adapted(tiny):
    return run_arm(ADAPTER, 1, 1e-2)


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
    assert (adapted["seed"], adapted["lr"]) == (1, 1e-2) and math.isfinite(adapted["test"])
    names = {"seed", "lr", "trained", "all", "curve", "validation", "test", "losses", "seconds"}
    assert set(adapted) == names and json.loads(json.dumps(adapted)) == adapted


def test_the_same_seed_gives_the_same_run_and_another_seed_another(adapted, tiny):
    def measured(run):
        return {key: value for key, value in run.items() if key != "seconds"}

    torch.rand(3)  # what was drawn before is of no account
    assert measured(run_arm(ADAPTER, 1, 1e-2)) == measured(adapted)
    other = run_arm(ADAPTER, 2, 1e-2)
    assert other["losses"] != adapted["losses"] and other["test"] != adapted["test"]


def by_hand(model, arm, seed, rate):
    """Training spelt out: AdamW, the gradient clipped at 1, the rate falling in a line to 0."""
    train = rows(arm.domain, "train")[: arm.train_examples]
    plan = batches(train, arm.batch_size, arm.steps, seed)
    trained = [p for name, p in model.named_parameters() if not arm.trainable_pattern or name.endswith("_proj.weight")]
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
    [WHOLE, replace(WHOLE, trainable_pattern=r".*_proj\.weight"), replace(WHOLE, train_examples=5)],
    ids=["all", "linear layers", "five examples"],
)
def test_full_arms_train_as_spelt_out_by_hand(arm, tiny):
    found, model = run_arm(arm, 0, 2e-3), by_hand(copy.deepcopy(tiny), arm, 0, 2e-3)
    for part in ("validation", "test"):
        assert found[part] == pytest.approx(held_out_loss(model, rows("restaurants", part), PAD), abs=1e-5)
    every = sum(p.numel() for p in tiny.parameters())
    assert found["trained"] == (sum(d * k for d, k in linear(tiny).values()) if arm.trainable_pattern else every)
    assert found["all"] == every
    own = held_out_loss(model, rows("restaurants", "train")[:5], PAD)
    assert [point.get("train") for point in found["curve"]][-1] == (
        pytest.approx(own, abs=1e-4) if arm.train_examples == 5 else None
    )


def test_a_run_that_diverges_says_so(tiny):
    found = run_arm(WHOLE, 0, 1e30)
    assert found["validation"] == found["test"] == math.inf
    assert set(found) == {"seed", "lr", "trained", "all", "validation", "test"}


def test_a_run_whose_last_step_diverges_says_so_too(tiny, monkeypatch):
    monkeypatch.setattr(training_run, "held_out_loss", lambda *_: math.nan)  # where the losses of all steps were finite
    found = run_arm(replace(WHOLE, steps=1), 0, 1e-3)
    assert found["validation"] == found["test"] == math.inf and "curve" not in found


def test_a_random_start_depends_on_the_seed_alone(tiny, rng_untouched):
    arm = replace(WHOLE, initial_weights="random")
    expected = seeded(4, lambda: LlamaForCausalLM(tiny.config)).state_dict()
    found = build_model(arm, 4)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(build_model(arm, 5)[0].state_dict()["lm_head.weight"], expected["lm_head.weight"])


def test_an_adapter_begins_as_its_seed_says(tiny, rng_untouched):
    first, again, other = (lora_layers(build_model(ADAPTER, seed)[0]) for seed in (1, 1, 2))
    for path, layer in first.items():
        assert torch.equal(layer.lora_A, again[path].lora_A) and not torch.equal(layer.lora_A, other[path].lora_A)
        assert not layer.lora_B.any()


SOURCE, LOW = replace(WHOLE, report=True), replace(ADAPTER, report=True)


@pytest.fixture(scope="module")
def whole_sweep(tiny, tmp_path_factory):
    """A directory with finished runs of two arms that save their weights; the third seed's are the second's again."""
    directory = tmp_path_factory.mktemp("sweep")
    for part in ("runs", "weights"):
        (directory / part).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "scores", no_texts([]))
        for arm in (SOURCE, LOW):
            for seed in (0, 1):
                found = run_arm(arm, seed, 4e-3, directory)
                save_run(directory, arm, found)
            save_run(directory, arm, found | {"seed": 2})
            shutil.copy(weights_path(directory, arm, 1, 4e-3), weights_path(directory, arm, 2, 4e-3))
    return directory


@pytest.fixture
def swept(whole_sweep, monkeypatch, tmp_path):
    """A copy of it, and the table reduced to its two arms."""
    monkeypatch.setattr(arms, "ARMS", [SOURCE, LOW])
    return shutil.copytree(whole_sweep, tmp_path / "sweep")


def test_an_arm_begins_with_the_weights_of_the_same_seed_that_another_saved(swept, tiny, quick):
    after = Arm("tasks", "then weather", None, 1e-3, 3, 2, domain="weather", initial_weights="tasks/full", report=True)
    for seed in SEEDS:
        kept = load_runs(swept, SOURCE)[seed, 4e-3]["validation"]
        model, _ = build_model(after, seed, swept)
        assert held_out_loss(model, rows("restaurants", "validation"), PAD) == pytest.approx(kept, abs=1e-6)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_runs(swept, SOURCE)[0, 4e-3]["validation"] != kept
    found = run_arm(after, 1, 1e-3, swept)
    assert found["curve"][0]["restaurants"] == pytest.approx(kept, abs=1e-4)
    assert set(found["curve"][0]) == {"step", "validation", "prose", "restaurants"}
    adapter = build_model(replace(after, adapter=lora(4)), 1, swept)[0]
    assert held_out_loss(adapter, rows("restaurants", "validation"), PAD) == pytest.approx(kept, abs=1e-6)


def test_an_arm_whose_start_has_not_finished_is_refused(swept, refused):
    after = Arm("tasks", "then weather", None, 1e-3, initial_weights="tasks/full")
    (swept / "runs" / f"{file_stem(SOURCE)}-2-0.004.json").unlink()
    for where in (None, swept, swept / "weights"):
        refused(lambda: build_model(after, 0, where), "tasks/then weather", "tasks/full", "not finished", str(where))
    with pytest.raises(LookupError, match="'tasks'; it has 'full'"):
        build_model(replace(after, initial_weights="tasks/none"), 0, swept)


def test_a_report_saves_what_was_trained_and_judges_the_merged_model(tiny, quick, tmp_path):
    (tmp_path / "weights").mkdir()
    for arm in (replace(ADAPTER, report=True), replace(WHOLE, trainable_pattern=r".*_proj\.weight", report=True)):
        found = run_arm(arm, 0, 5e-3, tmp_path)
        kept = load_file(weights_path(tmp_path, arm, 0, 5e-3))
        assert sum(p.numel() for p in kept.values()) == found["trained"]
        ends = ("lora_A", "lora_B") if arm.adapter else ("_proj.weight",)
        assert all(name.endswith(ends) for name in kept) and len(kept) == len(ends) * len(linear(tiny))
        model = quick.pop()
        assert all(module.merged for module in model.modules() if isinstance(module, LoRALayer))
        loss = held_out_loss(model, rows("restaurants", "validation"), PAD)
        assert loss == pytest.approx(found["validation"], abs=1e-5)
        assert (found["bleu"], found["slot_errors"]) == (12.5, 0.25)
        assert found["texts"] == [example.texts[0] for example in training_run.load_splits("restaurants")["test"]][:8]
        assert [point["step"] for point in found["curve"]] == [0, 1, 2, 3]
        assert all(set(point) == {"step", "validation", "prose"} for point in found["curve"])


def test_a_report_writes_texts_and_without_a_directory_saves_no_weights(tiny, monkeypatch):
    monkeypatch.setattr(training_run, "save_file", None)
    found = run_arm(replace(WHOLE, steps=1, report=True), 0, 1e-3)
    assert len(found["texts"]) == 4 and 0 <= found["bleu"] <= 100 and found["slot_errors"] >= 0
    assert found["curve"][0]["prose"] == pytest.approx(prose_bits(tiny, TOKENIZER), abs=1e-4)


def test_updates_come_from_the_saved_weights(swept, tiny):
    for arm in (SOURCE, LOW):
        found, state = updates_of(arm, 1, swept), tiny.state_dict()
        kept = load_file(weights_path(swept, arm, 1, 4e-3))
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
    found = collect(arms.ARMS, swept, updates_of)
    assert list(found["anatomy"]) == ["full", "r = 8"]
    for seeds in found["anatomy"].values():
        assert len(seeds) == 3 and seeds[1] == seeds[2] != seeds[0]
        assert all(math.isfinite(value) for seed in seeds for value in seed.values())
    sizes = [(dW.norm() / W0.norm()).item() for W0, dW in updates_of(LOW, 0, swept).values()]
    assert found["anatomy"]["r = 8"][0]["size"] == pytest.approx(sum(sizes) / len(sizes))
    for name in ("full, two seeds", "r = 8, two seeds"):
        first, second, same = found["overlap"][name]
        assert first == second and same["left"] == pytest.approx(1, abs=1e-4) and first["left"] < 0.99
    assert len(found["overlap"]["full and r = 8"]) == 3
