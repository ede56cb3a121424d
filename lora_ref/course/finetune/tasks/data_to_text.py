"""Data to text by a causal language model: the course's own grammar, or data in E2E's form."""

import importlib.util
from dataclasses import replace

from ...text.data_to_text import collate, encode, held_out_loss, prompt, summed_loss
from ...text.evaluation import bleu, generate_texts
from ...text.grammar import DOMAINS, Example, slot_error_rate
from ..config import Profile
from .examples import examples_from_grammar, examples_from_tables
from .task import Task


class DataToTextTask(Task):
    """Data to text, by a causal language model: the course's own grammar, or data in E2E's form."""

    unit = "nats a token"

    def __init__(self, tokenizer, profile: Profile):
        data = profile.data
        if importlib.util.find_spec("sacrebleu") is None:
            raise ImportError("BLEU needs the library sacrebleu: pip install sacrebleu")
        own = data.dataset in DOMAINS
        self.parts = examples_from_grammar(data) if own else examples_from_tables(data)
        super().__init__(tokenizer, profile, {part: len(found) for part, found in self.parts.items()})
        self.slot_rule = "grammar" if own else "verbatim"
        for part, found in self.parts.items():
            if own:  # four texts to a record: the first is trained on or scored, all are references
                found = [replace(example, texts=example.texts[:1]) for example in found]
            self.add_part(part, encode(tokenizer, found))
        self.rows["train"] = self.rows["train"][: data.max_train_samples]
        self.counts["train"] = len(self.rows["train"])

    def summed_loss(self, model, rows, num_adapters=1):
        return summed_loss(model, collate(rows, self.tokenizer.eos_token_id), num_adapters)[0]

    def loss_denominator(self, rows):
        return sum(len(row.ids) - row.prompt_length for row in rows)

    def held_out_loss(self, model, part):
        return held_out_loss(model, self.rows[part], self.tokenizer.eos_token_id)

    def evaluate(self, model):
        found = self.parts["test"]
        texts = generate_texts(model, self.tokenizer, found, max_new_tokens=self.profile.data.max_new_tokens)
        score = bleu(texts, [example.texts for example in found])
        rate = (slot_error_rate if self.slot_rule == "grammar" else verbatim_slot_errors)(list(zip(found, texts)))
        measures = {"loss": self.held_out_loss(model, "test"), "bleu": score, "slot_errors": rate}
        return measures | {"accuracy": None, "f1": None}, texts

    def test_pairs(self):
        return [(prompt(example).strip(), example.texts[0]) for example in self.parts["test"]]

    def longest_sequence(self) -> int:
        """Tokens of the longest test prompt with all that may be written after it."""
        prompts = self.tokenizer([prompt(e) for e in self.parts["test"]], add_special_tokens=False)["input_ids"]
        return max(map(len, prompts)) + self.profile.data.max_new_tokens


def verbatim_slot_errors(found: list[tuple[Example, str]]) -> float:
    """The share of values that a text does not have word for word, in any case; yes and no are not looked for."""
    pairs = [
        (value.lower(), text.lower())
        for example, text in found
        for value in example.slots.values()
        if value.lower() not in ("yes", "no")
    ]
    return sum(value not in text for value, text in pairs) / max(1, len(pairs))
