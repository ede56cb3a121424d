"""What all tasks have in common: rows of token ids, the plan of batches, each process's share of a step's loss."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ...text.data_to_text import batches
from ..config import Profile


class Task:
    """The common part of all tasks.

    Attributes:
        rows: the examples of each part as rows of token ids.
        counts: how many examples each part has, those that are left out included.
        dropped: how many were longer than max_length.
        unit: of the loss. slot_rule: how slots are looked for in a text; None where there are none.
        head_modules: what is trained in full beside an adapter, None for nothing: see `read_model`.
    """

    unit = ""
    slot_rule: str | None = None
    head_modules: list[str] | None = None

    def __init__(self, tokenizer, profile: Profile, counts: dict[str, int]):
        self.tokenizer, self.profile, self.counts = tokenizer, profile, counts
        self.rows: dict[str, list] = {}
        self.dropped = 0

    def add_part(self, part: str, rows: list) -> None:
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

    def read_model(self, model: nn.Module) -> None:
        """Note what the task must know of the model. Errors: ValueError for a model that cannot do the task."""

    def summed_loss(self, model: nn.Module, rows: Sequence, num_adapters: int = 1) -> Tensor:
        """The summed loss of some rows, in nats: a scalar with a gradient; for several adapters, one sum for each."""
        raise NotImplementedError

    def loss_denominator(self, rows: Sequence) -> int:
        """Over how many the mean loss of these rows is taken."""
        raise NotImplementedError

    def plan(self, seed: int) -> list[list[int]]:
        """For every step, which training rows."""
        size, found = self.profile.optimisation.batch_size, len(self.rows["train"])
        if size > found:
            raise ValueError(f"batch_size = {size}, but there are {found} examples to train on; lower it")
        return batches(self.rows["train"], size, self.profile.optimisation.steps, seed)

    def loss(self, plan: list[list[int]], process: int = 0, processes: int = 1, num_adapters: int = 1) -> Callable:
        """loss(model, t, part): this process's and this part's share of the mean loss of step t.

        With num_adapters > 1 there is one share for each adapter.

            share = Σ of its own tokens' losses / number of tokens in the whole step

        so that the shares of all processes and parts add up to the mean over tokens, however they are divided.
        """
        stride = processes * self.profile.optimisation.gradient_accumulation_steps
        more = (num_adapters,) if num_adapters > 1 else ()

        def loss(model: nn.Module, t: int, part: int = 0) -> Tensor:
            chosen = [self.rows["train"][i] for i in plan[t]]
            return self.summed_loss(model, chosen[part * processes + process :: stride], *more) / self.loss_denominator(
                chosen
            )

        return loss

    def tokens(self, chosen: list[int]) -> int:
        """Tokens of a step, padding excluded."""
        return sum(len(self.rows["train"][i].ids) for i in chosen)

    def held_out_loss(self, model: nn.Module, part: str) -> float:
        """The mean loss over a part; the model as it is."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> tuple[dict, list[str]]:
        """(measures on the test part, in the record's names; the model's answers)."""
        raise NotImplementedError

    def test_pairs(self) -> list[tuple[str, str]]:
        """(input, reference) of the test examples, in the order of the answers."""
        raise NotImplementedError
