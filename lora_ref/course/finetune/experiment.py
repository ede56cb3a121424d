"""Fine-tune a language model in full and with LoRA, and compare: an experiment and its record.

    python -m lora_ref.course.finetune --profile cpu-mini --output DIR

The profile is a row of lora_ref.course.finetune.profiles, and every setting of it an option; `accelerate launch -m
lora_ref.course.finetune …` runs it in several processes. DIR ends with record.json (see
lora_ref.course.finetune.records), the adapters in PEFT's format and the log; a model that was tuned in full is
evaluated, and not saved. After an interruption the same command resumes the run.

For each arm (full, or a rank) the learning rate is chosen on validation examples: see lora_ref.course.finetune.search.
With --parallel-adapters E the search trains up to E adapters at the same time on one frozen base: see lora_ref.batched.
"""

import math
import os
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from ... import environment
from .base_model import check_packages, make_base, new_model
from .config import OptimisationSettings, Profile
from .hub import load_model, load_tokenizer
from .preparation import check_model, make_accelerator
from .profiles import profile as get_profile
from .records import FORMAT, load_record, write_record
from .report import shown_samples, table
from .run_directory import RunDirectory
from .search import chosen_lr, next_trials
from .tasks import Task, make_task
from .trial import TrialRunner


def finetune(name: str = "cpu-mini", output: str | Path = "finetune", *, progress: bool = True, **overrides) -> dict:
    """Run a profile's experiment: full fine-tuning against LoRA, learning rates tuned, several seeds.

    A directory in which the same run was interrupted is resumed; one in which it is done gives its record.

    Args:
        name: the profile, a key of lora_ref.course.finetune.profiles.PROFILES.
        output: the run's directory, made if need be.
        progress: show a progress bar on stderr.
        **overrides: settings instead of the profile's own, by their flat names: steps=50, max_length=128 …

    Returns:
        The record, as `load_record` gives it.

    Raises:
        ValueError, TypeError: before anything is written: an unknown profile or setting, a value out of range, another
            run's directory, a GPU's profile without a GPU, data without the expected columns or rows, a tokeniser that
            does not fit the model, a model without the targets.
        FileNotFoundError, ConnectionError, ImportError: before anything is written: what cannot be had.
        MemoryError, KeyboardInterrupt: later; the checkpoint stays, and the same call resumes.
        FloatingPointError: all learning rates of an arm diverged.

    Example:
        >>> finetune("cpu-mini", "out", batch=8)
        Traceback (most recent call last):
            ...
        ValueError: batch is called batch_size now
    """
    profile = get_profile(name, **overrides)
    is_main_process = int(os.environ.get("RANK", 0)) == 0
    directory = RunDirectory(output, name, profile.model_dump(mode="json"), is_main_process)
    if (directory.path / "record.json").exists():
        record = load_record(directory.path / "record.json")
        if is_main_process:
            print(f"{directory.path} has this run, done:\n\n{table(record)}")
        return record
    threads = torch.get_num_threads()
    torch.set_num_threads(profile.system.threads or threads)
    try:
        return Experiment(name, profile, directory, progress).run()
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or directory.interruption_message()) from None
    finally:
        torch.set_num_threads(threads)


class Experiment:
    """A profile's experiment in a directory: everything is checked when it is made, `run` does it.

    Errors: those of `finetune` before anything is written.
    """

    def __init__(self, name: str, profile: Profile, directory: RunDirectory, progress: bool):
        self.name, self.profile, self.directory, self.progress = name, profile, directory, progress
        self.load = environment.load()
        self.accelerator = make_accelerator(profile.system)  # of all processes; each trial has its own
        _check_processes(profile.optimisation, self.accelerator.num_processes)
        self.is_new_base = profile.base.model == "new"
        if self.is_new_base:
            check_packages(profile.base)
        tokenizer = load_tokenizer("prose_llama" if self.is_new_base else profile.base.model)
        self.task: Task = make_task(tokenizer, profile)
        first_seed = profile.optimisation.seeds[0]
        self.task.plan(first_seed)
        model = new_model(profile.base, "meta") if self.is_new_base else self.load_base(first_seed)
        self.task.read_model(model)
        check_model(model, tokenizer, self.task, profile)

    def load_base(self, seed: int) -> nn.Module:
        """The base model, loaded anew. Adapters name it by this name."""
        source = str((self.directory.path / "base").resolve()) if self.is_new_base else self.profile.base.model
        labels = getattr(self.task, "labels", None)
        return load_model(source, self.profile.data.task, labels, seed)

    def run(self) -> dict:
        """All trials; the record."""
        self.accelerator.wait_for_everyone()  # every process has looked at the directory
        with self.directory.open():
            self.accelerator.wait_for_everyone()
            self._log_start()
            try:
                bits = self._make_base()
                runs, diverged = self._run_trials()
            finally:
                self.directory.save_elapsed()
            record = self._record(bits, runs, diverged)
            if self.directory.is_main_process:
                write_record(record, self.directory.path / "record.json")
            self.directory.log("\n" + table(record) + "\n\n" + shown_samples(record))
            self.directory.log(f"\nwritten to {self.directory.path}: record.json, adapters/, log.txt")
            self.accelerator.wait_for_everyone()
        return record

    def _log_start(self) -> None:
        data, processes = self.profile.data, self.accelerator.num_processes
        where = f"{self.accelerator.device}, {processes} process(es)"
        self.directory.log(f"{self.name}: {self.profile.base.model} on {data.dataset}, {where}")
        if self.task.dropped:
            self.directory.log(f"{self.task.dropped} examples of more than {data.max_length} tokens are left out")

    def _make_base(self) -> float | None:
        if not self.is_new_base:
            return None
        return make_base(self.profile.base, self.directory, self.accelerator, self.progress)

    def _run_trials(self) -> tuple[list[dict], list[dict]]:
        """(the runs, those that diverged), arm by arm: the search, then the other seeds."""
        optimisation, results, losses = self.profile.optimisation, {}, {}
        runner = TrialRunner(self.profile, self.task, self.directory, self.load_base, self.progress)
        while groups := next_trials(optimisation, losses):
            for trials in groups:
                results |= zip(trials, runner.run(trials), strict=True)
                losses = {trial: result.get("validation", math.inf) for trial, result in results.items()}
        best = {arm: chosen_lr(optimisation, arm, losses) for arm in optimisation.arms}
        runs, diverged = [], []
        for trial in sorted(results, key=lambda trial: optimisation.arms.index(trial.arm)):
            if "reason" in results[trial]:
                diverged.append(results[trial])
            else:
                runs.append(results[trial] | {"chosen": trial.lr == best[trial.arm]})
        return runs, diverged

    def _record(self, bits: float | None, runs: list[dict], diverged: list[dict]) -> dict:
        profile, accelerator = self.profile, self.accelerator
        return {
            "format": FORMAT,
            "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "profile": self.name,
            "settings": profile.model_dump(mode="json"),
            "environment": environment.environment(accelerator.device, accelerator.num_processes, self.load),
            "model": profile.base.model,
            "data": profile.data.dataset,
            "examples": self.task.counts,
            "slot_rule": self.task.slot_rule,
            "base_bits_per_byte": bits,
            "runs": runs,
            "diverged": diverged,
            "seconds": self.directory.elapsed_seconds(),
        }


def _check_processes(optimisation: OptimisationSettings, processes: int) -> None:
    """Refuse a batch that the processes cannot share, and parallel adapters in several processes."""
    parts = processes * optimisation.gradient_accumulation_steps
    if optimisation.batch_size % parts:
        raise ValueError(
            f"batch_size = {optimisation.batch_size} is no multiple of {processes} process(es) × "
            f"gradient_accumulation_steps = {optimisation.gradient_accumulation_steps}; each must have as many "
            f"examples: choose a batch_size such as {parts * 4}"
        )
    if optimisation.parallel_adapters > 1 and processes > 1:
        raise ValueError(
            f"parallel_adapters = {optimisation.parallel_adapters}, but parallel adapters share one process, and there "
            f"are {processes}; add --parallel-adapters 1"
        )
