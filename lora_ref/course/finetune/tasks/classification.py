"""Classification of one or two sentences: GLUE's SST-2, MRPC and whatever has their columns."""

from typing import NamedTuple

import torch
from sklearn.metrics import f1_score
from torch import nn

from ....peft_format import CLASSIFIER_HEADS
from ..config import Profile
from .examples import labelled_rows
from .task import Task


class LabelRow(NamedTuple):
    """One example to classify, as token ids; `types` tells two sentences apart where the model reads that."""

    ids: list[int]
    types: list[int] | None
    label: int


class ClassificationTask(Task):
    """Sentences, or pairs of them, into classes: GLUE's SST-2, MRPC and whatever has their columns.

    `head_modules` are the model's new layers, `has_token_types` says whether it tells two sentences apart: `read_model`
    sets both.
    """

    unit = "nats an example"
    has_token_types = False

    def __init__(self, tokenizer, profile: Profile):
        data = profile.data
        parts, self.columns = labelled_rows(data)
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
            self.add_part(
                part, [LabelRow(*row) for row in zip(found["input_ids"], types, (int(r["label"]) for r in rows))]
            )

    def read_model(self, model):
        heads = [name for name in CLASSIFIER_HEADS if hasattr(model, name)]
        if not heads:
            raise ValueError(f"{type(model).__name__} has no head named {' or '.join(CLASSIFIER_HEADS)} to train")
        self.head_modules = heads
        self.has_token_types = getattr(model.config, "type_vocab_size", 1) > 1

    def summed_loss(self, model, rows):
        device, length = next(model.parameters()).device, max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)], mask[i, : len(row.ids)] = torch.tensor(row.ids), 1
            if self.has_token_types and row.types is not None:
                types[i, : len(row.ids)] = torch.tensor(row.types)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.has_token_types:
            inputs["token_type_ids"] = types
        logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits.float()
        self.logits = logits.detach()
        return nn.functional.cross_entropy(
            logits, torch.tensor([row.label for row in rows], device=device), reduction="sum"
        )

    def loss_denominator(self, rows):
        return len(rows)

    @torch.no_grad()
    def predict(self, model: nn.Module, part: str) -> tuple[float, list[int]]:
        """(the mean loss over a part, the likeliest label of each row)."""
        rows, total, predictions = self.rows[part], 0.0, []
        for i in range(0, len(rows), 32):
            total += self.summed_loss(model, rows[i : i + 32]).item()
            predictions += self.logits.argmax(-1).tolist()
        return total / len(rows), predictions

    def held_out_loss(self, model, part):
        return self.predict(model, part)[0]

    def evaluate(self, model):
        loss, predictions = self.predict(model, "test")
        labels = [row.label for row in self.rows["test"]]
        measures = {"loss": loss, "bleu": None, "slot_errors": None}
        measures["accuracy"] = sum(a == b for a, b in zip(predictions, labels)) / len(labels)
        measures["f1"] = float(f1_score(labels, predictions, zero_division=0.0)) if self.labels == 2 else None
        return measures, [str(prediction) for prediction in predictions]

    def test_pairs(self):
        return [(" | ".join(row[name] for name in self.columns), row["label"]) for row in self.test]
