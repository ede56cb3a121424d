"""The settings of a fine-tuning run, each declared once: type, default, range, unit, choices, description.

    Profile()                                     # five groups of settings; what a run depends on, and nothing else
    Profile.model_json_schema()                   # the same declaration as JSON schema

The options of the command, their help, the checks and the error messages are made from this declaration: see
lora_ref.course.finetune.settings. Every setting has a flat name there, which options and overrides use.
"""

from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Item = TypeVar("Item")


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _check_unique(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("has a value twice; name each once")
    return values


def _unit(name: str) -> dict[str, str]:
    return {"unit": name}


Several = Annotated[tuple[Item, ...], BeforeValidator(_list_to_tuple), Field(min_length=1)]
Distinct = Annotated[Several[Item], AfterValidator(_check_unique)]
Name = Annotated[str, Field(min_length=1)]
Arm = Annotated[str, Field(pattern=r"^(full|r=[1-9][0-9]*)$", description="an arm is 'full', or a rank such as 'r=8'")]
Seed = Annotated[int, Field(ge=0)]
LearningRate = Annotated[float, Field(ge=1e-9, le=10)]
Precision = Literal["fp32", "bf16", "fp16"]


class _Group(BaseModel):
    """Settings that cannot be changed; an integer is no boolean, a list is as good as a tuple, NaN is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSettings(_Group):
    """The task and its examples."""

    task: Literal["data-to-text", "classification"] = Field("data-to-text", description="what is learnt")
    dataset: Name = Field(
        "restaurants",
        description="a grammar of this course (restaurants, weather), a file or a directory of csv, tsv, json or jsonl "
        "files, or a name on the Hugging Face Hub, NAME[:CONFIGURATION][@REVISION]",
    )
    max_train_samples: int = Field(
        2000, ge=1, description="examples to train on, at most", json_schema_extra=_unit("examples")
    )
    max_validation_samples: int = Field(
        100, ge=1, description="examples to choose learning rates by, at most", json_schema_extra=_unit("examples")
    )
    max_test_samples: int = Field(
        100, ge=1, description="examples to evaluate on, at most", json_schema_extra=_unit("examples")
    )
    max_length: int = Field(
        256, ge=2, description="longest example; longer ones are left out", json_schema_extra=_unit("tokens")
    )
    max_new_tokens: int = Field(96, ge=1, description="longest generated text", json_schema_extra=_unit("tokens"))
    num_samples: int = Field(5, ge=0, description="generated texts in the record", json_schema_extra=_unit("texts"))

    @property
    def max_samples(self) -> dict[str, int]:
        """The largest number of examples of each part: train, validation, test."""
        return {
            "train": self.max_train_samples,
            "validation": self.max_validation_samples,
            "test": self.max_test_samples,
        }


class AdapterSettings(_Group):
    """LoRA's settings, all but the rank, which each arm has; PEFT's names."""

    lora_alpha: float = Field(32.0, ge=1e-6, description="α of the scale α/r")
    target_modules: Several[Name] = Field(("all-linear",), description="the adapted layers")
    lora_dropout: float = Field(0.0, ge=0, le=0.99, description="dropout probability before A")
    use_rslora: bool = Field(False, description="scale α/√r instead of α/r")


class OptimisationSettings(_Group):
    """What is compared, the search for learning rates, and AdamW's settings."""

    arms: Distinct[Arm] = Field(("full", "r=8"), description="what is compared: full fine-tuning, or a rank")
    seeds: Distinct[Seed] = Field((0,), description="seeds; learning rates are chosen with the first one")
    full_lrs: Distinct[LearningRate] = Field((4e-3,), description="peak learning rates of full fine-tuning to try")
    lora_lrs: Distinct[LearningRate] = Field((8e-3,), description="peak learning rates of LoRA to try")
    parallel_adapters: int = Field(
        1,
        ge=1,
        description="adapters that train at the same time, on one frozen base, during the search",
        json_schema_extra=_unit("adapters"),
    )
    steps: int = Field(100, ge=2, description="optimizer steps of one training", json_schema_extra=_unit("steps"))
    batch_size: int = Field(
        16, ge=1, description="examples of one step, over all processes and parts", json_schema_extra=_unit("examples")
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="parts into which the batch of a step is divided", json_schema_extra=_unit("parts")
    )
    warmup_ratio: float = Field(0.1, ge=0, le=0.9, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's weight decay")
    max_grad_norm: float = Field(1.0, ge=1e-9, description="gradients are clipped to this norm")
    num_evals: int = Field(
        5,
        ge=1,
        description="evaluations of the validation loss in one training",
        json_schema_extra=_unit("evaluations"),
    )

    @property
    def warmup_steps(self) -> int:
        """min(steps − 1, round(warmup_ratio · steps)): never all of the steps."""
        return min(self.steps - 1, round(self.warmup_ratio * self.steps))

    @model_validator(mode="after")
    def _check_parts_of_equal_size(self) -> Self:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size = {self.batch_size} is no multiple of gradient_accumulation_steps = "
                f"{self.gradient_accumulation_steps}; parts must be of equal size"
            )
        return self


class SystemSettings(_Group):
    """The machine, the arithmetic and the memory."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to train; auto takes a GPU if there is one, cuda requires one"
    )
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads of a process; 0 leaves the number to torch",
        json_schema_extra=_unit("threads"),
    )
    precision: Precision = Field("fp32", description="type of the arithmetic (trained weights stay fp32)")
    frozen_dtype: Precision = Field("fp32", description="type of the weights that LoRA freezes")
    gradient_checkpointing: bool = Field(
        False, description="store no activations inside a block, compute them again in the backward pass"
    )


class BaseModelSettings(_Group):
    """The base model, and how it is made if it is "new"."""

    model: Name = Field(
        "prose_llama",
        description="the base model: prose_llama (shipped), new (pretrained here, see --base-…), a directory that "
        "save_pretrained wrote, or a name on the Hugging Face Hub",
    )
    hidden_size: int = Field(640, ge=8, description="of a new model: width")
    num_layers: int = Field(10, ge=1, description="of a new model: layers")
    num_heads: int = Field(10, ge=1, description="of a new model: attention heads")
    steps: int = Field(2500, ge=2, description="of a new model: pretraining steps", json_schema_extra=_unit("steps"))
    batch_size: int = Field(
        64, ge=1, description="of a new model: windows of a pretraining step", json_schema_extra=_unit("windows")
    )
    length: int = Field(
        256, ge=8, le=512, description="of a new model: length of a window", json_schema_extra=_unit("tokens")
    )
    lr: LearningRate = Field(1e-3, description="of a new model: peak learning rate")
    packages: Several[Name] = Field(
        ("all",), description="of a new model: Python packages whose docstrings it is trained on"
    )

    @model_validator(mode="after")
    def _check_head_width(self) -> Self:
        if self.model == "new" and self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"base_hidden_size = {self.hidden_size} is no multiple of 2·base_num_heads = {2 * self.num_heads}; a "
                "head's width must be even"
            )
        return self


class Profile(BaseModel):
    """All that a run depends on, in five groups. It cannot be changed, and unknown settings are refused.

    The description, range, unit and choices of each setting stand at its field; `Profile.model_json_schema()` has all
    of them.

    Args:
        data: the task and its examples.
        adapter: LoRA's settings, all but the rank.
        optimisation: the arms, the seeds, the search for learning rates, AdamW's settings.
        system: device, precision, memory.
        base: the base model, and how a new one is made.

    Raises:
        pydantic.ValidationError: (a ValueError) a value of another type or out of its range, or two settings that
            contradict each other. `settings.to_profile` and `profiles.profile` raise it in words.

    Example:
        >>> profile = Profile(optimisation={"steps": 50, "arms": ["r=3"]})
        >>> profile.optimisation.arms, profile.optimisation.warmup_steps, profile.data.dataset
        (('r=3',), 5, 'restaurants')
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: DataSettings = Field(DataSettings(), description="the task and its examples")
    adapter: AdapterSettings = Field(AdapterSettings(), description="LoRA's settings, all but the rank")
    optimisation: OptimisationSettings = Field(
        OptimisationSettings(), description="what is compared, the search for learning rates, AdamW"
    )
    system: SystemSettings = Field(SystemSettings(), description="the machine, the arithmetic and the memory")
    base: BaseModelSettings = Field(BaseModelSettings(), description="the base model")

    @model_validator(mode="after")
    def _check_classifier(self) -> Self:
        if self.data.task == "classification" and self.base.model in ("prose_llama", "new"):
            raise ValueError(
                f"model = {self.base.model!r} writes text; task = 'classification' needs a classifier's directory or "
                "name"
            )
        return self

    @model_validator(mode="after")
    def _check_parallel_adapters(self) -> Self:
        number = self.optimisation.parallel_adapters
        if number > 1 and self.data.task == "classification":
            raise ValueError(
                f"parallel_adapters = {number}, but each adapter of a classifier trains the model's head too, which "
                "parallel adapters would share; choose parallel_adapters = 1"
            )
        if number > 1 and self.system.precision == "fp16":
            raise ValueError(
                f"parallel_adapters = {number}, but fp16 scales all gradients by one number, which parallel adapters "
                "would share; choose precision = 'bf16', or parallel_adapters = 1"
            )
        return self
