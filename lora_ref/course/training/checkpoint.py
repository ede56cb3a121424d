"""The checkpoint of a training run: one file, whole or not there, from which the run resumes bit for bit.

    {"settings", "step", "model", "optimizer", "generators", "scaler",         what the next step depends on
     "losses", "scalar_loss", "evaluations", "step_seconds", "memory", "seconds"}      what the history has

"model" are the trained parameters by name, "optimizer" is AdamW's state; under FSDP2, where each process has a share of
both, torch.distributed.checkpoint puts them together. "generators" are torch's global ones, of each process.
"""

from pathlib import Path
from typing import Any

import torch

from ..._files import atomic_write
from .state import TrainState, generator_state, set_generator_state

HISTORY = ("evaluations", "step_seconds", "memory")


class Checkpoint:
    """The file of a run, or none (path None), in which case nothing is written.

    run_settings: what must be the same for the run to be the same; saved_step: the steps done in the file.
    """

    def __init__(self, path: str | Path | None, run_settings: dict):
        self.path = None if path is None else Path(path)
        self.run_settings = run_settings
        self.saved_step: int | None = None

    def hint(self) -> str:
        """Where the run is, for messages."""
        if self.path is None or self.saved_step is None:
            return ""
        return f"; {self.path} holds the run as it was after step {self.saved_step}"

    def save(self, state: TrainState) -> None:
        """Write the file: all processes take part, the main one writes."""
        if self.path is None:
            return
        generators = [generator_state(state.device)]
        if state.distributed:
            from accelerate.utils import gather_object

            generators = gather_object(generators)
        trained, moments = _gather(state)
        scaler = getattr(state.accelerator, "scaler", None)
        content = {
            "settings": self.run_settings,
            "step": state.steps_done,
            "model": trained,
            "optimizer": moments,
            "generators": generators,
            "scaler": None if scaler is None else scaler.state_dict(),
            "losses": state.progress.losses,
            "scalar_loss": state.progress.scalar_loss,
            "seconds": state.progress.seconds(),
        } | {name: getattr(state.progress, name) for name in HISTORY}
        if state.is_main_process:
            with atomic_write(self.path) as file:
                torch.save(content, file)
        self.saved_step = state.steps_done

    def resume(self, state: TrainState) -> None:
        """Put the file's content into `state`, if there is a file. Errors: ValueError for another run's; no change."""
        if self.path is not None and self.path.exists():
            saved = _upgrade(torch.load(self.path, map_location="cpu", weights_only=True))
            names = self.run_settings | saved["settings"]
            differ = [name for name in names if saved["settings"].get(name) != self.run_settings.get(name)]
            if differ:
                raise ValueError(
                    f"{self.path} is of another run: {', '.join(differ)} differ; remove it, or name another file"
                )
            _scatter(state, saved["model"], saved["optimizer"])
            scaler = getattr(state.accelerator, "scaler", None)
            if saved["scaler"] is not None and scaler is not None:
                scaler.load_state_dict(saved["scaler"])
            rank = 0 if state.accelerator is None else state.accelerator.process_index
            set_generator_state(saved["generators"][min(rank, len(saved["generators"]) - 1)])
            for name in ("losses", "scalar_loss", *HISTORY):
                setattr(state.progress, name, saved[name])
            state.progress.seconds_before = saved["seconds"]
            state.progress.resumed_at = self.saved_step = saved["step"]
            state.diverged = state.progress.diverged()
        if state.accelerator is not None and state.distributed:
            state.accelerator.wait_for_everyone()


def _upgrade(saved: dict) -> dict:
    """A checkpoint as it is written now, from one of before version 0.2.

    That had other names for the settings, each group's peak learning rate as a multiple of "rate", and the losses as
    the loss function returned them: numbers or lists.
    """
    if "scalar_loss" in saved:
        return saved
    old = saved["settings"]
    lrs = {"lrs": [old["rate"] * ratio for ratio in old["ratios"]]} if "ratios" in old else {"lr": old["rate"]}
    settings = {"steps": old["steps"], "warmup_steps": old["warmup"], "trained": old["trained"]} | lrs
    scalar_loss = not any(isinstance(loss, list) for loss in saved["losses"])
    losses = [[loss] for loss in saved["losses"]] if scalar_loss else saved["losses"]
    return saved | {"settings": settings, "losses": losses, "scalar_loss": scalar_loss}


def _gather(state: TrainState) -> tuple[dict, dict]:
    """(what is trained, by name; the optimizer's state), whole in the main process at least."""
    if not state.sharded:
        return {name: p.detach() for name, p in state.trained_parameters().items()}, state.optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    trained = get_model_state_dict(state.model, options=_whole())
    if state.steps_done == 0:  # an empty state would be filled by a step on no gradients, and count as one
        return trained, {}
    return trained, get_optimizer_state_dict(state.model, _unwrapped(state.optimizer), options=_whole())


def _scatter(state: TrainState, trained: dict, moments: dict) -> None:
    """The opposite of `_gather`."""
    if state.sharded:
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        options = _whole(strict=False)
        set_model_state_dict(state.model, trained, options=options)
        if moments:
            set_optimizer_state_dict(state.model, _unwrapped(state.optimizer), moments, options=options)
        return
    with torch.no_grad():
        for name, param in state.trained_parameters().items():
            param.copy_(trained[name])
    state.optimizer.load_state_dict(moments)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself: under FSDP2 accelerate has wrapped it."""
    return optimizer.optimizer


def _whole(**more):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, **more)
