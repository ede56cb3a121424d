"""The arms of the language-model experiments: what each one trains, on what, for how long."""

from collections.abc import Sequence
from dataclasses import dataclass

SEEDS = (0, 1, 2)
TRAIN_EXAMPLES = 2000  # that an arm trains on by default
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MLP = LINEAR[4:]


@dataclass(frozen=True)
class Arm:
    """What is trained, and how.

    Args:
        experiment: the experiment that it belongs to.
        name: its name there.
        adapter: the fields of a LoRAConfig; None: no adapter, the model's own parameters are trained.
        initial_lr: the learning rate at which the search begins.
        steps: steps of a run.
        batch_size: examples of a step.
        train_examples: how many examples there are to train on.
        domain: the grammar's domain, "restaurants" or "weather".
        initial_weights: "prose_llama" (the shipped model), "random", or "experiment/name" of an arm whose trained
            weights, of the same seed, this one begins with.
        trainable_pattern: without an adapter: only parameters whose names match this regular expression are trained
            (default: all).
        report: whether runs also measure forgetting along the way, texts, BLEU and slot errors, and save the weights.

    Example:
        >>> arm = Arm("rank", "r = 4", {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj"]}, initial_lr=8e-3)
        >>> arm.steps, arm.batch_size, arm.train_examples
        (100, 8, 2000)
    """

    experiment: str
    name: str
    adapter: dict | None
    initial_lr: float
    steps: int = 100
    batch_size: int = 8
    train_examples: int = TRAIN_EXAMPLES
    domain: str = "restaurants"
    initial_weights: str = "prose_llama"
    trainable_pattern: str = ""
    report: bool = False


def lora(r: int, targets: Sequence[str] = LINEAR, **settings) -> dict:
    """The fields of a LoRAConfig with α = 32, as the arms have it; on all linear layers if nothing else is passed.

    Args:
        r: the rank.
        targets: names of the layers to adapt.
        settings: more fields of LoRAConfig.

    Returns:
        An arm's `adapter`.

    Example:
        >>> lora(8, ["q_proj"], lora_dropout=0.1)
        {'r': 8, 'lora_alpha': 32, 'target_modules': ['q_proj'], 'lora_dropout': 0.1}
    """
    return {"r": r, "lora_alpha": 32, "target_modules": targets, **settings}


def lora_by_pattern(ranks: dict[str, int]) -> dict:
    """All linear layers, with a rank for each pattern; α/r = 4 in each, as at r = 8."""
    return lora(8, rank_pattern=ranks, alpha_pattern={pattern: 4 * r for pattern, r in ranks.items()})


LORA_LR, FULL_LR = 8e-3, 1e-3  # where the search for a learning rate begins
ATTENTION_LAYERS, MLP_LAYERS = r"self_attn\.\w+", r"mlp\.\w+"
BOTH = (("full", None, FULL_LR), ("r = 8", lora(8), LORA_LR))
ARMS = [  # a budget is that of r = 8 on all linear layers: 116,736 numbers, met within 3 %
    *(Arm("rank", f"r = {r}", lora(r), LORA_LR) for r in (8, 1, 64, 16, 2, 4, 32)),
    Arm("rank", "full", None, FULL_LR),
    Arm("tasks", "full", None, FULL_LR, steps=200, batch_size=16, report=True),
    Arm("tasks", "r = 8", lora(8), LORA_LR, steps=200, batch_size=16, report=True),
    Arm("tasks", "from scratch", None, 4e-3, steps=200, batch_size=16, initial_weights="random", report=True),
    Arm("placement", "q", lora(76, ["q_proj"]), LORA_LR),
    Arm("placement", "k", lora(76, ["k_proj"]), LORA_LR),
    Arm("placement", "v", lora(76, ["v_proj"]), LORA_LR),
    Arm("placement", "o", lora(76, ["o_proj"]), LORA_LR),
    Arm("placement", "q, v", lora(38, ["q_proj", "v_proj"]), LORA_LR),
    Arm("placement", "q, k, v, o", lora(19, LINEAR[:4]), LORA_LR),
    Arm("placement", "MLP", lora(14, MLP), LORA_LR),
    Arm("tasks", "full, then weather", None, FULL_LR, domain="weather", initial_weights="tasks/full", report=True),
    Arm("tasks", "r = 8, then weather", lora(8), LORA_LR, domain="weather", initial_weights="tasks/full", report=True),
    Arm("few examples", "full", None, FULL_LR, train_examples=50),
    *(Arm("few examples", f"r = {r}", lora(r), LORA_LR, train_examples=50) for r in (1, 8, 64)),
    *(Arm("batch", f"{name}, batch {size}", adapter, lr * (size / 8) ** 0.5, steps=800 // size, batch_size=size)
      for size in (32, 2) for name, adapter, lr in BOTH),
    Arm("layers", "more in attention", lora_by_pattern({ATTENTION_LAYERS: 16, MLP_LAYERS: 2}), LORA_LR),
    Arm("layers", "more in the MLP", lora_by_pattern({ATTENTION_LAYERS: 2, MLP_LAYERS: 12}), LORA_LR),
    Arm("rank", "full, linear layers only", None, FULL_LR, trainable_pattern=r".*_proj\.weight"),
    Arm("few examples", "from scratch", None, 4e-3, train_examples=50, initial_weights="random"),
]  # fmt: skip


def find_arm(experiment: str, name: str) -> Arm:
    """The arm of this name.

    Args:
        experiment: "rank", "tasks", "placement", "few examples", "batch" or "layers".
        name: the arm's name in the experiment.

    Returns:
        The arm of the table.

    Raises:
        LookupError: there is no such arm; the message has the names that there are.

    Example:
        >>> find_arm("rank", "r = 8").adapter["r"]
        8
    """
    for arm in ARMS:
        if (arm.experiment, arm.name) == (experiment, name):
            return arm
    known = ", ".join(repr(arm.name) for arm in ARMS if arm.experiment == experiment)
    raise LookupError(f"no arm {name!r} in {experiment!r}; it has {known or 'none: there is no such experiment'}")
