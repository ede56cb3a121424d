"""What a fine-tuning run learns and is judged by: data-to-text, or the classification of one or two sentences.

A task holds the examples of its three parts as rows of token ids, and knows the loss of a batch, a step's shares of
it, the loss on held-out rows and the measures of a trained model. Batches are padded; padding is masked in the
attention and not scored.
"""

import importlib.util
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from ..text.data_to_text import batches, collate, encode, held_out_loss, prompt, summed_loss
from ..text.evaluation import bleu, generate_texts
from ..text.grammar import DOMAINS, Example, examples, slot_error_rate
from .config import DataSettings, Profile
from .settings import did_you_mean
from .tables import load_tables, three_parts

RECORD, TEXT = ("meaning_representation", "mr"), ("human_reference", "ref")  # E2E's columns, and its files'
SENTENCES = (("sentence1", "sentence2"), ("sentence",))  # MRPC's, SST-2's
SLOT = re.compile(r"\s*([^,\[\]]+?)\s*\[([^\[\]]*)\]\s*")


class LabelRow(NamedTuple):
    """One example to classify, as token ids; `types` tells two sentences apart where the model wants that."""

    ids: list[int]
    types: list[int] | None
    label: int


class Task:
    """The common part. `rows` are token ids by part; `dropped` is how many examples were longer than max_length."""

    unit = ""
    slot_rule: str | None = None

    def __init__(self, tokenizer, profile: Profile, counts: dict[str, int]):
        self.tokenizer, self.profile, self.counts = tokenizer, profile, counts
        self.rows: dict[str, list] = {}
        self.dropped = 0

    def keep(self, part: str, rows: list) -> None:
        """Keep the rows of a part that are not too long. Errors: ValueError where none is left."""
        short = [row for row in rows if len(row.ids) <= self.profile.data.max_length]
        if not short:
            raise ValueError(
                f"all {len(rows)} examples of the {part} part are longer than max_length = "
                f"{self.profile.data.max_length} tokens (the shortest has {min(len(row.ids) for row in rows)}); raise "
                "max_length"
            )
        self.dropped += len(rows) - len(short)
        self.rows[part] = short

    def total(self, model: nn.Module, rows: Sequence, copies: int = 1) -> Tensor:
        """The summed loss of some rows, in nats: a scalar with a gradient; of so many copies of them, one for each."""
        raise NotImplementedError

    def weight(self, rows: Sequence) -> int:
        """Over how many the mean loss of these rows is taken."""
        raise NotImplementedError

    def plan(self, seed: int) -> list[list[int]]:
        """For every step, which training rows."""
        size, found = self.profile.optimisation.batch_size, len(self.rows["train"])
        if size > found:
            raise ValueError(f"batch_size = {size}, but there are {found} examples to train on; lower it")
        return batches(self.rows["train"], size, self.profile.optimisation.steps, seed)

    def loss(self, plan: list[list[int]], process: int = 0, processes: int = 1, copies: int = 1) -> Callable:
        """loss(model, t, part): this process's and this part's share of the mean loss of step t; with copies > 1 one
        for each copy of the step's rows.

            share = Σ of its own tokens' losses / number of tokens in the whole step

        so that the shares of all processes and parts add up to the mean over tokens, however they are dealt out.
        """
        every = processes * self.profile.optimisation.gradient_accumulation_steps
        more = (copies,) if copies > 1 else ()

        def loss(model: nn.Module, t: int, part: int = 0) -> Tensor:
            chosen = [self.rows["train"][i] for i in plan[t]]
            return self.total(model, chosen[part * processes + process :: every], *more) / self.weight(chosen)

        return loss

    def tokens(self, chosen: list[int]) -> int:
        """Tokens of a step, padding excluded."""
        return sum(len(self.rows["train"][i].ids) for i in chosen)

    def held_out(self, model: nn.Module, part: str) -> float:
        """The mean loss over a part; the model as it is."""
        raise NotImplementedError

    def judge(self, model: nn.Module) -> tuple[dict, list[str]]:
        """(measures on the test part, in the record's names; the model's answers)."""
        raise NotImplementedError

    def asked(self) -> list[tuple[str, str]]:
        """(input, reference) of the test examples, in the order of the answers."""
        raise NotImplementedError


class TextTask(Task):
    """Data to text, by a causal language model: the course's own grammar, or data in E2E's form."""

    unit = "nats a token"

    def __init__(self, tokenizer, profile: Profile):
        data = profile.data
        if importlib.util.find_spec("sacrebleu") is None:
            raise ImportError("BLEU needs the library sacrebleu: pip install sacrebleu")
        own = data.dataset in DOMAINS
        self.parts = _from_grammar(data) if own else _from_tables(data)
        super().__init__(tokenizer, profile, {part: len(found) for part, found in self.parts.items()})
        self.slot_rule = "grammar" if own else "verbatim"
        for part, found in self.parts.items():
            if own:  # four texts to a record: the first is learnt or scored, all are references
                found = [replace(example, texts=example.texts[:1]) for example in found]
            self.keep(part, encode(tokenizer, found))
        self.rows["train"] = self.rows["train"][: data.max_train_samples]
        self.counts["train"] = len(self.rows["train"])

    def total(self, model, rows, copies=1):
        return summed_loss(model, collate(rows, self.tokenizer.eos_token_id), copies)[0]

    def weight(self, rows):
        return sum(len(row.ids) - row.prompt_length for row in rows)

    def held_out(self, model, part):
        return held_out_loss(model, self.rows[part], self.tokenizer.eos_token_id)

    def judge(self, model):
        found = self.parts["test"]
        texts = generate_texts(model, self.tokenizer, found, max_new_tokens=self.profile.data.max_new_tokens)
        score = bleu(texts, [example.texts for example in found])
        rate = (slot_error_rate if self.slot_rule == "grammar" else verbatim_slot_errors)(list(zip(found, texts)))
        measures = {"loss": self.held_out(model, "test"), "bleu": score, "slot_errors": rate}
        return measures | {"accuracy": None, "f1": None}, texts

    def asked(self):
        return [(prompt(example).strip(), example.texts[0]) for example in self.parts["test"]]

    def longest(self) -> int:
        """Tokens of the longest test prompt with all that may be written after it."""
        prompts = self.tokenizer([prompt(e) for e in self.parts["test"]], add_special_tokens=False)["input_ids"]
        return max(map(len, prompts)) + self.profile.data.max_new_tokens


class LabelTask(Task):
    """Sentences, or pairs of them, into classes: GLUE's SST-2, MRPC and whatever has their columns.

    `head` names the model's new layers, `types` says whether the model tells two sentences apart: see check_model.
    """

    unit = "nats an example"
    head: list[str] | None = None
    types = False

    def __init__(self, tokenizer, profile: Profile):
        data = profile.data
        parts, self.columns = _labelled(data)
        super().__init__(tokenizer, profile, {part: len(rows) for part, rows in parts.items()})
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokeniser has no padding token; set tokenizer.pad_token and save it again")
        self.labels = 1 + max(int(row["label"]) for rows in parts.values() for row in rows)
        if self.labels < 2:
            raise ValueError(f"{data.dataset} has the label 0 alone; there is nothing to tell apart")
        self.test = parts["test"]
        for part, rows in parts.items():
            found = tokenizer(
                *([row[name] for row in rows] for name in self.columns), truncation=True, max_length=data.max_length
            )
            types = found.get("token_type_ids") or [None] * len(rows)
            self.keep(part, [LabelRow(*row) for row in zip(found["input_ids"], types, (int(r["label"]) for r in rows))])

    def total(self, model, rows):
        device, length = next(model.parameters()).device, max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)], mask[i, : len(row.ids)] = torch.tensor(row.ids), 1
            if self.types and row.types is not None:
                types[i, : len(row.ids)] = torch.tensor(row.types)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.types:
            inputs["token_type_ids"] = types
        logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits.float()
        self.logits = logits.detach()
        return nn.functional.cross_entropy(
            logits, torch.tensor([row.label for row in rows], device=device), reduction="sum"
        )

    def weight(self, rows):
        return len(rows)

    @torch.no_grad()
    def guessed(self, model: nn.Module, part: str) -> tuple[float, list[int]]:
        """(the mean loss over a part, the likeliest label of each row)."""
        rows, total, guesses = self.rows[part], 0.0, []
        for i in range(0, len(rows), 32):
            total += self.total(model, rows[i : i + 32]).item()
            guesses += self.logits.argmax(-1).tolist()
        return total / len(rows), guesses

    def held_out(self, model, part):
        return self.guessed(model, part)[0]

    def judge(self, model):
        loss, guesses = self.guessed(model, "test")
        labels = [row.label for row in self.rows["test"]]
        measures = {"loss": loss, "bleu": None, "slot_errors": None}
        measures["accuracy"] = sum(a == b for a, b in zip(guesses, labels)) / len(labels)
        measures["f1"] = float(f1_score(labels, guesses, zero_division=0.0)) if self.labels == 2 else None
        return measures, [str(guess) for guess in guesses]

    def asked(self):
        return [(" | ".join(row[name] for name in self.columns), row["label"]) for row in self.test]


def make_task(tokenizer, profile: Profile) -> Task:
    """The profile's task on its data. Errors: ValueError and those of load_tables, before any training."""
    return (TextTask if profile.data.task == "data-to-text" else LabelTask)(tokenizer, profile)


def verbatim_slot_errors(found: list[tuple[Example, str]]) -> float:
    """The share of values that a text does not have word for word, in any case; yes and no are not looked for."""
    pairs = [
        (value.lower(), text.lower())
        for example, text in found
        for value in example.slots.values()
        if value.lower() not in ("yes", "no")
    ]
    return sum(value not in text for value, text in pairs) / max(1, len(pairs))


def _from_grammar(data: DataSettings) -> dict[str, list[Example]]:
    found, parts, start = examples(data.dataset, sum(data.max_samples.values()), texts=4), {}, 0
    for part, number in data.max_samples.items():
        parts[part] = found[start : start + number]
        start += number
    return parts


def _from_tables(data: DataSettings) -> dict[str, list[Example]]:
    """Records with all their texts, by part; a record is in one part only where the parts are cut here."""
    groups = {}
    for part, rows in load_tables(data.dataset).items():
        record, text = _column(data.dataset, rows[0], RECORD), _column(data.dataset, rows[0], TEXT)
        texts: dict[str, list[str]] = {}
        for i, row in enumerate(rows):
            if not row.get(record) or not row.get(text):
                raise ValueError(
                    f"{data.dataset}, {part} part: row {i + 1} has no {record if not row.get(record) else text}"
                )
            texts.setdefault(row[record], []).append(row[text])
        groups[part] = [Example("e2e", _slots(data.dataset, part, record), said) for record, said in texts.items()]
    parts = three_parts(groups, data.max_samples)
    random.Random(0).shuffle(parts["train"])
    return {"train": parts["train"]} | {part: parts[part][: data.max_samples[part]] for part in ("validation", "test")}


def _slots(data: str, part: str, record: str) -> dict[str, str]:
    """name[The Eagle], area[riverside] → {"name": "The Eagle", "area": "riverside"}."""
    found = SLOT.findall(record)
    if not found or SLOT.sub("", record).replace(",", "").strip():
        raise ValueError(f"{data}, {part} part: {record!r:.60} is no record; it must read slot[value], slot[value]")
    return dict(found)


def _labelled(data: DataSettings) -> tuple[dict[str, list[dict]], tuple[str, ...]]:
    """(rows with a label by part, the columns of the sentences). GLUE's test parts have labels of −1: no labels."""
    tables, columns = load_tables(data.dataset), ()
    parts = {}
    for part, rows in tables.items():
        label = _column(data.dataset, rows[0], ("label",))
        columns = next((names for names in SENTENCES if all(name in rows[0] for name in names)), ())
        if not columns:
            raise ValueError(_lacks(data.dataset, rows[0], "sentence1 and sentence2, or sentence"))
        for i, row in enumerate(rows):
            if not re.fullmatch(r"-?\d+", str(row[label]).strip()):
                raise ValueError(
                    f"{data.dataset}, {part} part: row {i + 1} has the label {row[label]!r}; it must be 0, 1, …"
                )
        kept = [
            {name: row[name] or "" for name in columns} | {"label": str(row[label]).strip()}
            for row in rows
            if int(row[label]) >= 0
        ]
        if kept:
            parts[part] = kept
    if "train" not in parts:
        raise ValueError(f"{data.dataset} has no labelled row to train on")
    if "test" not in parts and "validation" in parts:  # as is usual with GLUE: its validation part judges
        parts["test"] = parts.pop("validation")
    parts = three_parts(parts, data.max_samples)
    return {part: rows[: data.max_samples[part]] for part, rows in parts.items()}, columns


def _column(data: str, row: dict, names: tuple[str, ...]) -> str:
    for name in names:
        if name in row:
            return name
    raise ValueError(_lacks(data, row, " or ".join(names)))


def _lacks(data: str, row: dict, wanted: str) -> str:
    known = [name for name in row if isinstance(name, str)]
    return (
        f"{data} has no column {wanted}; {did_you_mean(wanted.split(' ')[0], known) if known else 'it has no columns'}"
    )
