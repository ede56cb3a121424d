"""Fine-tune a language model in full and with LoRA, and compare.

    python -m lora_ref.course.finetune --profile cpu-mini --output DIR

The profile is a row of lora_ref.course.finetune.profiles, and every field of it an option; `accelerate launch -m
lora_ref.course.finetune …` runs it in several processes. DIR ends with record.json (see lora_ref.course.finetune.records), the
adapters in PEFT's format and the log; a model that was tuned in full is judged, and not kept. Interrupted or killed,
the same command goes on where it was.

For each arm (full, or a rank) the learning rate is chosen on validation examples: see lora_ref.course.finetune.search. With
--together E the search trains up to E adapters at once on one frozen base: see lora_ref.batched.
"""

import io
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from ... import environment as machine
from ...batched import adapter_parameters, for_each_adapter, single_adapter
from ...checkpoint import save_adapter
from ...config import LoRAConfig
from ...model import count_parameters, merge
from ..training import History, train
from ..training.errors import out_of_memory, process_lost, reason
from ..training.history import Diverged, fault
from .base_model import check_packages, make_base, new_model
from .hub import load_model, load_tokenizer
from .preparation import accelerator_for, adapted, check_model, lora_config
from .profiles import Profile, arguments, profile
from .records import FORMAT, load_record, write_record
from .report import shown_samples, summary, table, training
from .run_directory import NOTHING_DONE, Workplace
from .search import Trial, best, following, name_of
from .tasks import Task, make_task


def finetune(name: str = "cpu-mini", output: str | Path = "finetune", *, progress: bool = True, **overrides) -> dict:
    """Run a profile, with these fields instead of its own, into `output`; return the record.

    A directory in which the same run was interrupted is gone on with; one in which it is done gives its record.
    Errors, before anything is written: ValueError (TypeError) for an unknown profile or field, a value out of range,
    another run's directory, a GPU's profile without a GPU, data without the expected columns or rows, a tokeniser that
    does not fit the model, a model without the targets; FileNotFoundError, ConnectionError, ImportError for what cannot
    be had. Later, with the checkpoint kept: MemoryError, KeyboardInterrupt, FloatingPointError when all rates of an arm
    diverge.
    """
    p = profile(name, **overrides)
    place = Workplace(output, name, asdict(p), first=int(os.environ.get("RANK", 0)) == 0)
    if (place.directory / "record.json").exists():
        record = load_record(place.directory / "record.json")
        if place.first:
            print(f"{place.directory} has this run, done:\n\n{table(record)}")
        return record
    threads = torch.get_num_threads()
    torch.set_num_threads(p.threads or threads)
    try:
        return Finetuning(name, p, place, progress).run()
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or place.interrupted()) from None
    finally:
        torch.set_num_threads(threads)


class Finetuning:
    """One run of one profile: what is checked before it, and its parts."""

    def __init__(self, name: str, p: Profile, place: Workplace, progress: bool):
        self.name, self.p, self.place, self.progress = name, p, place, progress
        self.load = machine.load()
        self.accelerator = accelerator_for(p)
        self.processes = self.accelerator.num_processes
        self.new = p.model == "new"
        self.source = str((place.directory / "base").resolve()) if self.new else p.model  # adapters name it
        if p.batch % (self.processes * p.accumulate):
            raise ValueError(
                f"batch = {p.batch} is no multiple of {self.processes} process(es) × accumulate = {p.accumulate}; "
                f"each must have as many examples: choose a batch such as {self.processes * p.accumulate * 4}"
            )
        if p.together > 1 and self.processes > 1:
            raise ValueError(
                f"together = {p.together}, but adapters at once share one process, and there are {self.processes}; add "
                "--together 1"
            )
        if self.new:
            check_packages(p)
        self.tokenizer = load_tokenizer("prose_llama" if self.new else p.model)
        self.task: Task = make_task(self.tokenizer, p)
        self.task.plan(p.seeds[0])
        model = new_model(p, "meta") if self.new else self.base(p.seeds[0])
        check_model(model, self.tokenizer, self.task, p)

    def base(self, seed: int) -> nn.Module:
        """The base model, fresh."""
        labels = getattr(self.task, "labels", None)
        return load_model(self.source, self.p.task, labels, seed)

    def run(self) -> dict:
        """All of it; the record."""
        p, place = self.p, self.place
        self.accelerator.wait_for_everyone()  # every process has looked at the directory
        place.begin()
        self.accelerator.wait_for_everyone()
        place.say(f"{self.name}: {p.model} on {p.data}, {self.accelerator.device}, {self.processes} process(es)")
        if self.task.dropped:
            place.say(f"{self.task.dropped} examples of more than {p.length} tokens are left out")
        try:
            bits = make_base(p, place, self.accelerator, self.progress) if self.new else None
            runs, diverged = self.searched()
        finally:
            place.stamp()
        record = {
            "format": FORMAT,
            "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "profile": self.name,
            "settings": asdict(p),
            "environment": machine.environment(self.accelerator.device, self.processes, self.load),
            "model": p.model,
            "data": p.data,
            "examples": self.task.counts,
            "slot_rule": self.task.slot_rule,
            "base_bits_per_byte": bits,
            "runs": runs,
            "diverged": diverged,
            "seconds": place.seconds(),
        }
        if place.first:
            write_record(record, place.directory / "record.json")
        place.say("\n" + table(record) + "\n\n" + shown_samples(record))
        place.say(f"\nwritten to {place.directory}: record.json, adapters/, log.txt")
        self.accelerator.wait_for_everyone()
        return record

    def searched(self) -> tuple[list[dict], list[dict]]:
        """(the runs, those that diverged), arm by arm: the search, then the other seeds."""
        p, done, known = self.p, {}, {}
        while groups := following(p, known):
            for trials in groups:
                done |= zip(trials, self.done(trials))
                known = {trial: run.get("validation", math.inf) for trial, run in done.items()}
        chosen = {arm: best(p, arm, known) for arm in p.arms}
        ordered = sorted(done, key=lambda trial: p.arms.index(trial.arm))
        runs = [done[t] | {"chosen": t.rate == chosen[t.arm]} for t in ordered if "reason" not in done[t]]
        return runs, [done[trial] for trial in ordered if "reason" in done[trial]]

    def done(self, trials: list[Trial]) -> list[dict]:
        """What the record says of these trainings, which are done at once if there are several.

        Done before, they are read; begun before, they are gone on with.
        """
        p, names, name = self.p, [name_of([trial]) for trial in trials], name_of(trials)
        known = [self.place.read(own) for own in names]
        if None not in known:
            self.place.drop(name)
            return known
        seed, several = trials[0].seed, len(trials) > 1
        before = self.before(seed)
        accelerator = self.accelerator = accelerator_for(p)
        configs = [lora_config(trial.arm, p, self.task) for trial in trials]
        model = adapted(self.base(seed), configs if several else configs[0], p, seed)
        torch.manual_seed(1009 * seed + accelerator.process_index)
        plan, meter = self.task.plan(seed), machine.Energy(accelerator.device)
        try:
            history = self.train(model, trials, plan, accelerator, name)
        except Diverged as error:
            history = History(error.losses, [])
        joules = meter.joules() if history.resumed_at == 0 and self.processes == 1 else None
        tokens = [self.task.tokens(chosen) for chosen in plan]
        if accelerator.distributed_type == "FSDP" and history.evaluations:
            model = self.gathered(configs[0], seed, name)
        for e, trial in enumerate(trials):
            if known[e] is not None:
                continue
            own = history.member(e) if several else history
            if reason := fault(enumerate(own.losses)) or fault(own.evaluations, "the validation loss"):
                run, said = trial._asdict() | {"reason": reason}, f"diverged: {reason}"
            else:
                told = {"together": len(trials), "energy_joules": joules}
                told |= training(own, tokens, self.probe(plan), len(trials))
                with single_adapter(model, e) if several else nullcontext():
                    run = self.outcome(model, configs[e], trial, told, before)
                said = summary(run)
            self.place.say(f"{trial.arm:<6} seed {seed}  rate {trial.rate:<8.3g}  {said}")
            self.place.write(names[e], run)
        self.place.drop(name)
        accelerator.free_memory()
        accelerator.wait_for_everyone()
        return [self.place.read(own) for own in names]  # the first process's, in all of them

    def outcome(self, model: nn.Module, config: LoRAConfig | None, trial: Trial, told: dict, before: tuple) -> dict:
        """What the record says of one training: its model is judged, its adapter saved."""
        count = count_parameters(model)
        if config is not None and self.p.frozen == "fp32":
            merge(model)
        measures, answers = self.task.judge(model.eval())
        directory = None if config is None else f"adapters/{name_of([trial])}"
        if config is not None and self.place.first:
            save_adapter(model, self.place.directory / directory)
        asked = self.task.asked()[: self.p.samples]
        return {
            "arm": trial.arm,
            "adapter": None if config is None else asdict(config),
            "seed": trial.seed,
            "rate": trial.rate,
            "chosen": False,
            "parameters_trained": count.trainable,
            "parameters": count.total,
            **told,
            "before": before[0],
            "after": measures,
            "samples": [
                {"input": i, "reference": r, "before": b, "after": a} for (i, r), b, a in zip(asked, before[1], answers)
            ],
            "adapter_directory": directory,
        }

    def train(self, model: nn.Module, trials: list[Trial], plan: list[list[int]], accelerator, name: str) -> History:
        p, n, rate, groups = self.p, len(trials), trials[0].rate, None

        def score(model: nn.Module) -> float:
            return self.task.held_out(model, "validation")

        if n > 1:
            groups = [{"params": adapter_parameters(model, e), "lr": t.rate} for e, t in enumerate(trials)]
        try:
            return train(
                model,
                self.task.loss(plan, accelerator.process_index, self.processes, n),
                p.steps,
                rate,
                param_groups=groups,
                warmup_steps=p.warmup_steps,
                weight_decay=p.weight_decay,
                max_grad_norm=p.clip,
                evaluate=score if n == 1 else lambda model: for_each_adapter(model, score),
                eval_steps=max(1, p.steps // p.evaluations),
                checkpoint_path=self.place.checkpoint(name),
                tokens_per_step=n * sum(map(self.task.tokens, plan)) // len(plan),
                progress=self.progress,
                accelerator=accelerator,
                gradient_accumulation_steps=p.accumulate,
                memory_step=self.probe(plan),
            )
        except MemoryError as error:
            fewer = f" or --together {n // 2} (now {p.together})" if n > 1 else ""
            raise MemoryError(
                f"{error}. The same command goes on from there with --accumulate {2 * p.accumulate} (now "
                f"{p.accumulate}) or --checkpointing true (now {str(p.checkpointing).lower()}){fewer}, which change no "
                f"result; or begin anew, into another output, with a lower --batch ({p.batch}) or --length ({p.length})"
            ) from None

    def probe(self, plan: list[list[int]]) -> int | None:
        """The step with the largest padded batch, the first one excepted: there its memory is measured."""
        if self.accelerator.device.type not in ("cpu", "cuda"):
            return None
        rows = self.task.rows["train"]
        return max(range(1, len(plan)), key=lambda t: len(plan[t]) * max(len(rows[i].ids) for i in plan[t]))

    def before(self, seed: int) -> tuple[dict, list[str]]:
        """What the base scores and answers. A new classifier's head depends on the seed, a language model does not."""
        name = f"before-seed{seed}" if self.p.task == "classification" else "before"
        known = self.place.read(name)
        if known is None:
            measures, texts = self.task.judge(self.prepared(self.base(seed)))
            self.place.write(name, {"measures": measures, "texts": texts[: self.p.samples]})
            self.accelerator.wait_for_everyone()
            known = self.place.read(name)
        return known["measures"], known["texts"]

    def gathered(self, config: LoRAConfig | None, seed: int, name: str) -> nn.Module:
        """The trained model whole in every process, from the checkpoint: after FSDP each has a share only."""
        model = adapted(self.base(seed), config, self.p, seed)
        saved = torch.load(self.place.checkpoint(name), map_location="cpu", weights_only=True)["model"]
        model.load_state_dict(saved, strict=False)
        return self.prepared(model)

    def prepared(self, model: nn.Module) -> nn.Module:
        """The model where and as it is run, for evaluation alone."""
        accelerator = accelerator_for(self.p)
        return accelerator.prepare_model(model.to(accelerator.device), evaluation_mode=True).eval()


def main(argv: list[str] | None = None) -> int:
    rank = int(os.environ.get("RANK", 0))
    if isinstance(sys.stdout, io.TextIOWrapper):  # what is written to a file or a pipe may not know α or half a letter
        sys.stdout.reconfigure(errors="replace")
    try:
        args, overrides = arguments(argv, __doc__.splitlines()[0])
        finetune(args.profile, args.output, progress=not args.quiet, **overrides)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, FloatingPointError) as error:
        print(f"error: process {rank}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        if rank == 0:
            print(f"\n{str(error) or NOTHING_DONE}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        said = str(error)
        if out_of_memory(error):  # in training it is a MemoryError
            said = f"out of memory while evaluating ({reason(error)}); lower --length or --new-tokens, in a new output"
        elif process_lost(error) and "another process" not in said:
            said = f"another process of this run has died ({reason(error)}); the same command goes on"
        elif "another process" not in said:
            raise
        print(f"error: process {rank}: {said}", file=sys.stderr)
        return 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
