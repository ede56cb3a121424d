"""tasks: what is scored, how it is shared between processes, and which data are refused."""

import copy
import json

import pytest
import torch

from lora_ref import LoRAConfig
from lora_ref.batched import add_batched_lora, for_each_adapter
from lora_ref.course.finetune.hub import load_model, load_tokenizer
from lora_ref.course.finetune.preparation import check_model
from lora_ref.course.finetune.profiles import profile
from lora_ref.course.finetune.tasks import make_task, verbatim_slot_errors
from lora_ref.course.text.data_to_text import text_loss
from lora_ref.course.text.grammar import Example
from tests.course.finetune.tiny_models import e2e, llama, mrpc, roberta, sst2, write_csv

SMALL = {
    "max_train_samples": 24,
    "max_validation_samples": 5,
    "max_test_samples": 4,
    "batch_size": 8,
    "steps": 3,
    "max_new_tokens": 6,
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("prose_llama")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return load_model(roberta(tmp_path_factory.mktemp("roberta")), "classification", 2)


def text_task(tokenizer, **changes):
    return make_task(tokenizer, profile("cpu-mini", **SMALL | changes))


def label_task(tokenizer, classifier, data, **changes):
    own = profile(
        "gpu-hub-mrpc", **SMALL | {"dataset": data, "max_length": 30, "model": "x", "precision": "fp32"} | changes
    )
    task = make_task(tokenizer, own)
    task.read_model(classifier)
    check_model(classifier, tokenizer, task, own)
    return task


def gradients(model, losses):
    model.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, [x.grad.clone() for x in model.parameters() if x.grad is not None]


@pytest.mark.parametrize("processes, accumulate", [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_the_shares_of_all_processes_and_parts_add_up_to_the_mean_over_tokens(tokenizer, model, processes, accumulate):
    task = text_task(tokenizer, gradient_accumulation_steps=accumulate)
    plan = task.plan(0)
    chosen = [task.rows["train"][i] for i in plan[1]]
    lengths = {len(row.ids) - row.prompt_length for row in chosen}
    assert len(lengths) > 1  # else a mean of means would pass
    expected, wanted = gradients(model, [text_loss(model, chosen, 0)])
    shares = [
        task.loss(plan, process, processes)(model, 1, part)
        for process in range(processes)
        for part in range(accumulate)
    ]
    total, found = gradients(model, shares)
    assert total == pytest.approx(expected, rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_of_a_step_that_is_read_by_several_adapters_each_one_has_its_own_loss(tokenizer, model, accumulate):
    task = text_task(tokenizer, gradient_accumulation_steps=accumulate)
    plan, config = task.plan(0), LoRAConfig(r=2, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    adapters = add_batched_lora(
        copy.deepcopy(model), [config] * 3, [torch.Generator().manual_seed(e) for e in range(3)]
    )
    with torch.no_grad():
        for part in range(accumulate):
            found = task.loss(plan, num_adapters=3)(adapters, 1, part)
            expected = torch.stack(for_each_adapter(adapters, lambda model: task.loss(plan)(model, 1, part)))
            assert found.shape == (3,) and expected.std() > 1e-3
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_padding_is_masked_and_not_scored(tokenizer, model, classifier, tmp_path):
    task = text_task(tokenizer)
    rows = sorted(task.rows["train"], key=lambda row: len(row.ids))
    short, long = rows[0], rows[-1]
    with torch.no_grad():
        apart = task.summed_loss(model, [short]) + task.summed_loss(model, [long])
        torch.testing.assert_close(task.summed_loss(model, [short, long]), apart, rtol=1e-5, atol=1e-4)
        labels, sharp = label_task(tokenizer, classifier, mrpc(tmp_path / "mrpc")), copy.deepcopy(classifier)
        for parameter in sharp.parameters():  # of a new model's attention one would not see much
            parameter.mul_(10)
        a, b = (pick(labels.rows["train"], key=lambda row: len(row.ids)) for pick in (min, max))
        apart = labels.summed_loss(sharp, [a]) + labels.summed_loss(sharp, [b])
        torch.testing.assert_close(labels.summed_loss(sharp, [a, b]), apart, rtol=1e-5, atol=1e-5)
        assert len(a.ids) < len(b.ids)


def test_the_grammars_records_have_one_scored_text_and_four_references(tokenizer, model):
    task = text_task(tokenizer)
    assert task.counts == {"train": 24, "validation": 5, "test": 4} and task.slot_rule == "grammar"
    assert [len(task.rows[part]) for part in ("train", "validation", "test")] == [24, 5, 4]
    assert all(len(example.texts) == 4 for example in task.parts["test"])
    assert not {e.meaning for e in task.parts["train"]} & {e.meaning for e in task.parts["test"]}
    measures, texts = task.evaluate(model)
    assert set(measures) == {"loss", "bleu", "slot_errors", "accuracy", "f1"} and len(texts) == 4
    assert measures["loss"] == pytest.approx(task.held_out_loss(model, "test")) and measures["accuracy"] is None
    assert task.test_pairs()[0][1] == task.parts["test"][0].texts[0]


def test_e2es_columns_give_records_with_all_their_texts(tokenizer, model, tmp_path):
    task = text_task(tokenizer, dataset=e2e(tmp_path / "e2e"))
    assert task.slot_rule == "verbatim" and task.counts == {"train": 24, "validation": 3, "test": 3}
    example = task.parts["test"][0]
    assert example.slots == {"name": "The test 0", "eatType": "pub", "familyFriendly": "yes"}
    assert example.texts == ["The test 0 is a pub.", "A pub for all is The test 0, by the river."]
    assert len(task.rows["train"]) == 24 and len(task.rows["test"]) == 6
    assert task.evaluate(model)[0]["slot_errors"] > 0


def test_the_first_files_names_of_e2e_and_a_single_file_work_too(tokenizer, tmp_path):
    rows = [(f"name[A {i}]", f"A {i} is here.") for i in range(30)]
    write_csv(tmp_path / "all.csv", ["mr", "ref"], rows)
    task = text_task(tokenizer, dataset=str(tmp_path / "all.csv"))
    assert task.counts == {"train": 24, "validation": 3, "test": 3}


def test_no_more_examples_than_the_profile_says(tokenizer, tmp_path):
    task = text_task(
        tokenizer, dataset=e2e(tmp_path / "e2e"), max_train_samples=9, max_validation_samples=2, max_test_samples=1
    )
    assert task.counts == {"train": 9, "validation": 2, "test": 1} and len(task.rows["train"]) == 9


def test_long_examples_are_left_out_and_counted_and_none_left_is_refused(tokenizer, refused):
    lengths = sorted(len(row.ids) for row in text_task(tokenizer).rows["train"])
    task = text_task(tokenizer, max_length=lengths[-2])
    assert task.dropped >= 1 and max(len(row.ids) for row in task.rows["train"]) <= lengths[-2]
    refused(
        lambda: text_task(tokenizer, max_length=3),
        "all 24 examples of the train part",
        "max_length = 3 ",
        "raise max_length",
    )


def test_a_batch_larger_than_the_data_is_refused(tokenizer, refused):
    task = text_task(tokenizer, batch_size=25)
    refused(lambda: task.plan(0), "batch_size = 25", "24 examples")


def test_sst2s_columns_and_test_labels_that_are_none(tokenizer, classifier, tmp_path):
    task = label_task(tokenizer, classifier, sst2(tmp_path / "sst2"))
    assert task.labels == 2 and task.columns == ("sentence",)
    # the validation part judges, as is usual with GLUE; another one is cut from the training part
    assert task.counts == {"train": 22, "validation": 2, "test": 4}
    assert [row["sentence"] for row in task.test] == [f"{'good' if i % 2 else 'bad'} film {i}" for i in range(4)]
    measures, answers = task.evaluate(classifier)
    right = sum(a == row["label"] for a, row in zip(answers, task.test))
    assert measures["accuracy"] == right / 4 and measures["bleu"] is None
    assert measures["loss"] == pytest.approx(task.held_out_loss(classifier, "test"), rel=1e-5)


def test_mrpcs_pairs_and_f1(tokenizer, classifier, tmp_path):
    task = label_task(tokenizer, classifier, mrpc(tmp_path / "mrpc"))
    assert task.columns == ("sentence1", "sentence2") and task.test_pairs()[0][0] == "a 0 | b"
    first = tokenizer("a 0")["input_ids"]
    assert any(row.ids[: len(first)] == first and len(row.ids) > len(first) for row in task.rows["test"])
    assert 0 <= task.evaluate(classifier)[0]["f1"] <= 1


@pytest.mark.parametrize(
    "guesses, labels, expected",
    [([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], 2 * 2 / (3 + 3)), ([0, 0], [0, 0], 0), ([0], [1], 0)],
)
def test_f1_is_label_1s(tokenizer, classifier, tmp_path, monkeypatch, guesses, labels, expected):
    task = label_task(tokenizer, classifier, mrpc(tmp_path / "mrpc"))
    task.rows["test"] = [task.rows["test"][0]._replace(label=label) for label in labels]
    monkeypatch.setattr(task, "predict", lambda model, part: (0.5, guesses))
    assert task.evaluate(classifier)[0]["f1"] == pytest.approx(expected)


def test_verbatim_slot_errors_counts_values_and_leaves_yes_and_no():
    example = Example("e2e", {"name": "The Fox", "food": "Thai", "familyFriendly": "yes"}, ["x"])
    assert verbatim_slot_errors([(example, "the fox serves food")]) == 0.5
    assert verbatim_slot_errors([(example, "THAI at The Fox"), (example, "")]) == 0.5


@pytest.mark.parametrize(
    "columns, row, says",
    [
        (["meaning_repr", "human_reference"], ("name[A]", "x"), ["no column meaning_representation", "'meaning_repr'"]),
        (["mr", "text"], ("name[A]", "x"), ["no column human_reference or ref", "there are mr, text"]),
        (["mr", "ref"], ("name[A]", ""), ["row 1 has no ref"]),
        (["mr", "ref"], ("no record", "x"), ["'no record' is no record", "slot[value]"]),
    ],
)
def test_text_data_of_another_form_are_refused(tokenizer, tmp_path, refused, columns, row, says):
    write_csv(tmp_path / "train.csv", columns, [row] * 5)
    refused(lambda: text_task(tokenizer, dataset=str(tmp_path)), *says)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"text": "a", "label": 1}, ["no column sentence1 and sentence2, or sentence"]),
        ({"sentence": "a", "lable": 1}, ["no column label", "'lable'"]),
        ({"sentence": "a", "label": 0.5}, ["row 1 has the label 0.5"]),
        ({"sentence": "a", "label": -1}, ["no labelled row"]),
        ({"sentence": "a", "label": 0}, ["nothing to tell apart"]),
    ],
)
def test_labelled_data_of_another_form_are_refused(tokenizer, classifier, tmp_path, refused, row, says):
    (tmp_path / "train.json").write_text(json.dumps([row] * 5))
    refused(lambda: label_task(tokenizer, classifier, str(tmp_path)), *says)


def test_bleus_library_is_asked_for_before_time_is_spent(tokenizer, monkeypatch):
    from lora_ref.course.finetune.tasks import data_to_text

    monkeypatch.setattr(data_to_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install sacrebleu"):
        text_task(tokenizer)
