"""One trial, or several that train at the same time: build the model, train it, evaluate it, save its adapter.

A trial's result is a dict with the fields of a record's run (see records.schema.Run), or of a diverged one.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...batched import adapter_parameters, for_each_adapter, single_adapter
from ...checkpoint import save_adapter
from ...config import LoRAConfig
from ...environment import Energy
from ...model import count_parameters, merge
from ..training import History, train
from ..training.history import Diverged, fault
from .config import Profile
from .preparation import lora_config, make_accelerator, prepare_model
from .report import summary, training_results
from .run_directory import RunDirectory
from .search import Trial, name_of
from .tasks import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Group:
    """Trials that train at the same time, of one seed; mostly a single one.

    Attributes:
        configs: each trial's adapter, None for full fine-tuning.
        plan: for every step, which training rows.
        memory_step: the step whose memory is measured.
    """

    trials: list[Trial]
    configs: list[LoRAConfig | None]
    plan: list[list[int]]
    memory_step: int | None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = name_of(self.trials)

    @property
    def size(self) -> int:
        return len(self.trials)

    @property
    def is_parallel(self) -> bool:
        return self.size > 1


class TrialRunner:
    """Runs the trials of one experiment, each with an Accelerator of its own."""

    def __init__(
        self,
        profile: Profile,
        task: Task,
        directory: RunDirectory,
        load_base: Callable[[int], nn.Module],
        progress: bool,
    ):
        self.profile, self.task, self.directory = profile, task, directory
        self.load_base, self.progress = load_base, progress

    def run(self, trials: list[Trial]) -> list[dict]:
        """The results of these trials. Those that are done are read; one that was interrupted is resumed."""
        names, name = [name_of([trial]) for trial in trials], name_of(trials)
        done = [self.directory.read(own) for own in names]
        if None not in done:
            self.directory.delete_checkpoint(name)
            return done
        seed = trials[0].seed
        before = self.evaluate_base(seed)
        accelerator = make_accelerator(self.profile.system)
        group = self.make_group(trials, accelerator)
        configs = group.configs if group.is_parallel else group.configs[0]
        model = prepare_model(self.load_base(seed), configs, self.profile.system, seed)
        torch.manual_seed(1009 * seed + accelerator.process_index)
        meter = Energy(accelerator.device)
        history = self.train(model, group, accelerator)
        joules = meter.joules() if history.resumed_at == 0 and accelerator.num_processes == 1 else None
        if accelerator.distributed_type == "FSDP" and history.evaluations:
            model = self.gather(group)
        for e, trial in enumerate(trials):
            if done[e] is None:
                result = self.result(model, group, e, history, joules, before)
                text = f"diverged: {result['reason']}" if "reason" in result else summary(result)
                self.directory.log(f"{trial.arm:<6} seed {seed}  rate {trial.lr:<8.3g}  {text}")
                self.directory.write(names[e], result)
        self.directory.delete_checkpoint(name)
        accelerator.free_memory()
        accelerator.wait_for_everyone()
        return [self.directory.read(own) for own in names]  # the main process's, in all of them

    def make_group(self, trials: list[Trial], accelerator: "Accelerator") -> Group:
        configs = [lora_config(trial.arm, self.profile.adapter, self.task.head_modules) for trial in trials]
        plan = self.task.plan(trials[0].seed)
        measurable = accelerator.device.type in ("cpu", "cuda")
        return Group(trials, configs, plan, _largest_step(self.task, plan) if measurable else None)

    def train(self, model: nn.Module, group: Group, accelerator: "Accelerator") -> History:
        """Train; a trial that diverged has its losses, and no evaluations."""
        optimisation = self.profile.optimisation

        def validation_loss(model: nn.Module) -> float:
            return self.task.held_out_loss(model, "validation")

        param_groups = None
        if group.is_parallel:
            param_groups = [{"params": adapter_parameters(model, e), "lr": t.lr} for e, t in enumerate(group.trials)]
        try:
            return train(
                model,
                self.task.loss(group.plan, accelerator.process_index, accelerator.num_processes, group.size),
                optimisation.steps,
                group.trials[0].lr,
                param_groups=param_groups,
                warmup_steps=optimisation.warmup_steps,
                weight_decay=optimisation.weight_decay,
                max_grad_norm=optimisation.max_grad_norm,
                evaluate=(lambda m: for_each_adapter(m, validation_loss)) if group.is_parallel else validation_loss,
                eval_steps=max(1, optimisation.steps // optimisation.num_evals),
                checkpoint_path=self.directory.checkpoint(group.name),
                tokens_per_step=group.size * sum(map(self.task.tokens, group.plan)) // len(group.plan),
                progress=self.progress,
                accelerator=accelerator,
                gradient_accumulation_steps=optimisation.gradient_accumulation_steps,
                memory_step=group.memory_step,
            )
        except Diverged as error:
            return History(error.losses, [])
        except MemoryError as error:
            raise MemoryError(f"{error}. {_less_memory(self.profile, group.size)}") from None

    def result(
        self, model: nn.Module, group: Group, e: int, history: History, joules: float | None, before: dict
    ) -> dict:
        """The result of trial e of the group."""
        trial, own = group.trials[e], history.member(e) if group.is_parallel else history
        reason = fault(enumerate(own.losses)) or fault(own.evaluations, "the validation loss")
        if reason:
            return {**trial._asdict(), "reason": reason}
        tokens = [self.task.tokens(chosen) for chosen in group.plan]
        trained = {"parallel_adapters": group.size, "energy_joules": joules}
        trained |= training_results(own, tokens, group.memory_step, group.size)
        with single_adapter(model, e) if group.is_parallel else nullcontext():
            return self.evaluate(model, group.configs[e], trial, trained, before)

    def evaluate(self, model: nn.Module, config: LoRAConfig | None, trial: Trial, trained: dict, before: dict) -> dict:
        """The result of a trial that did not diverge: the model is evaluated, its adapter saved."""
        count = count_parameters(model)
        if config is not None and self.profile.system.frozen_dtype == "fp32":
            merge(model)
        measures, answers = self.task.evaluate(model.eval())
        adapter_directory = None if config is None else f"adapters/{name_of([trial])}"
        if adapter_directory is not None and self.directory.is_main_process:
            save_adapter(model, self.directory.path / adapter_directory)
        pairs = self.task.test_pairs()[: self.profile.data.num_samples]
        return {
            "arm": trial.arm,
            "adapter": None if config is None else asdict(config),
            "seed": trial.seed,
            "lr": trial.lr,
            "chosen": False,
            "parameters_trained": count.trainable,
            "parameters": count.total,
            **trained,
            "before": before["measures"],
            "after": measures,
            "samples": [
                {"input": text, "reference": reference, "before": old, "after": new}
                for (text, reference), old, new in zip(pairs, before["texts"], answers, strict=False)
            ],
            "adapter_directory": adapter_directory,
        }

    def evaluate_base(self, seed: int) -> dict:
        """The base's measures and answers: of a classifier, whose head is new, by seed; of a language model once."""
        name = f"before-seed{seed}" if self.profile.data.task == "classification" else "before"
        found = self.directory.read(name)
        if found is None:
            accelerator = make_accelerator(self.profile.system)
            model = _for_evaluation(self.load_base(seed), accelerator)
            measures, texts = self.task.evaluate(model)
            self.directory.write(name, {"measures": measures, "texts": texts[: self.profile.data.num_samples]})
            accelerator.wait_for_everyone()
            found = self.directory.read(name)
        return found

    def gather(self, group: Group) -> nn.Module:
        """The trained model whole in every process, from the checkpoint: under FSDP each process has a share only."""
        system, seed = self.profile.system, group.trials[0].seed
        model = prepare_model(self.load_base(seed), group.configs[0], system, seed)
        saved = torch.load(self.directory.checkpoint(group.name), map_location="cpu", weights_only=True)["model"]
        model.load_state_dict(saved, strict=False)
        return _for_evaluation(model, make_accelerator(system))


def _for_evaluation(model: nn.Module, accelerator: "Accelerator") -> nn.Module:
    """The model where and as it is run, without training."""
    return accelerator.prepare_model(model.to(accelerator.device), evaluation_mode=True).eval()


def _largest_step(task: Task, plan: list[list[int]]) -> int:
    """The step with the largest padded batch, the first one excepted."""
    rows = task.rows["train"]

    def padded_tokens(step: int) -> int:
        return len(plan[step]) * max(len(rows[i].ids) for i in plan[step])

    return max(range(1, len(plan)), key=padded_tokens)


def _less_memory(profile: Profile, num_adapters: int) -> str:
    """What to do when memory does not suffice."""
    optimisation = profile.optimisation
    parts = optimisation.gradient_accumulation_steps
    checkpointing = str(profile.system.gradient_checkpointing).lower()
    fewer = ""
    if num_adapters > 1:
        fewer = f" or --parallel-adapters {num_adapters // 2} (now {optimisation.parallel_adapters})"
    return (
        f"The same command resumes from there with --gradient-accumulation-steps {2 * parts} (now {parts}) or "
        f"--gradient-checkpointing true (now {checkpointing}){fewer}, which change no result; or start again, into "
        f"another output, with a lower --batch-size ({optimisation.batch_size}) or --max-length "
        f"({profile.data.max_length})"
    )
