"""A run's directory: whose it is, its log, and the files of its parts.

DIR/run.json         the profile and its settings: the directory belongs to this run alone
DIR/log.txt          what the run logged
DIR/runs/            one file for each training that is done: an interrupted run resumes after them
DIR/checkpoints/     the training that is not
DIR/base/            the base model, where it was made here
DIR/adapters/        one directory for each adapter, in PEFT's format
DIR/record.json      all of it, checked

Directories of the former format, with flat settings and the former names, are resumed too: see records.legacy.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from ..._files import write_json
from .records.legacy import upgrade_run, upgrade_settings
from .settings import flatten

LOGGER = logging.getLogger("lora_ref.course.finetune")
# Settings that may change when a run is resumed: the result is the same.
FREE = ("device", "gradient_accumulation_steps", "gradient_checkpointing", "parallel_adapters", "threads")
NOTHING_DONE = "interrupted before the first step; nothing is lost, and the same command starts again"


class RunDirectory:
    """The directory of one run. Nothing is written before `open`, and after it by the main process only.

    Errors: ValueError for a directory that is a file, has another run's run.json, or is not empty and has none.
    """

    def __init__(self, path: str | Path, profile_name: str, settings: dict, is_main_process: bool = True):
        self.path, self.is_main_process = Path(path), is_main_process
        self.started, self.earlier_seconds = time.perf_counter(), 0.0
        self.description = json.loads(json.dumps({"profile": profile_name, "settings": settings}))
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output {path} is a file; name a directory")
        if self.path.is_dir() and any(self.path.iterdir()):
            self._check_owner()

    def _check_owner(self) -> None:
        file = self.path / "run.json"
        if not file.exists():
            raise ValueError(f"output {self.path} is not empty and holds no run of this command; name another one")
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
            theirs = flatten(upgrade_settings(other["settings"])) | {"profile": other["profile"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is no run's description; name another output") from None
        ours = flatten(self.description["settings"]) | {"profile": self.description["profile"]}
        differ = [key for key in sorted(ours | theirs) if key not in FREE and ours.get(key) != theirs.get(key)]
        if differ:
            changes = "; ".join(f"{key} was {theirs.get(key)!r}, now {ours.get(key)!r}" for key in differ)
            raise ValueError(f"output {self.path} is of another run ({changes}); name another one, or remove it")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the directories, say whose they are, and log to stdout and log.txt inside the `with`.

        The main process alone does that, and holds a lock, which ends with the process. Errors: ValueError where
        another command is at work in the directory.
        """
        if not self.is_main_process:
            self.earlier_seconds = self._elapsed_before()
            yield
            return
        for name in ("runs", "checkpoints", "adapters"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"output {self.path} is in use by another run of this command; wait for it") from None
        try:
            self.earlier_seconds = self._elapsed_before()
            if not (self.path / "run.json").exists():
                write_json(self.description, self.path / "run.json")
            with _logging_to(self.path / "log.txt"):
                yield
        finally:
            with suppress(OSError):  # Windows deletes no file that is open; it is empty and does no harm
                (self.path / ".lock").unlink(missing_ok=True)
            lock.release()

    def log(self, text: str) -> None:
        """Log a text, in the main process."""
        if self.is_main_process:
            LOGGER.info(text)

    def _elapsed_before(self) -> float:
        return (self.read("clock") or {"seconds": 0.0})["seconds"]

    def elapsed_seconds(self) -> float:
        """Of the whole run, without interruptions; of a process that was killed, up to its last part that was done."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def read(self, name: str) -> dict | None:
        """The result of a part that is done, None if it is not."""
        file = self.path / "runs" / f"{name}.json"
        return upgrade_run(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def write(self, name: str, content: dict) -> None:
        """Save the result of a part that is done, and delete its checkpoint."""
        if self.is_main_process:
            write_json(content, self.path / "runs" / f"{name}.json")
            self.save_elapsed()
            self.delete_checkpoint(name)

    def checkpoint(self, name: str) -> Path:
        return self.path / "checkpoints" / f"{name}.pt"

    def delete_checkpoint(self, name: str) -> None:
        if self.is_main_process:
            self.checkpoint(name).unlink(missing_ok=True)

    def save_elapsed(self) -> None:
        """Save the time, for a process that resumes from here."""
        if self.is_main_process:
            write_json({"seconds": self.elapsed_seconds()}, self.path / "runs" / "clock.json")

    def interruption_message(self) -> str:
        """What to say of an interruption outside the steps: whether anything was done yet."""
        runs = {path.stem for path in self.path.glob("runs/*.json") if path.stem.split("-")[0] != "before"}
        if runs - {"clock"} or any(self.path.glob("checkpoints/*.pt")) or (self.path / "base").exists():
            return f"interrupted between two steps; {self.path} holds what was done, and the same command resumes"
        return NOTHING_DONE


def _raise_again(record: logging.LogRecord) -> NoReturn:
    """Let the error of a full disk or a closed pipe end the run; logging would print it and continue."""
    raise  # the error that the handler is handling


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Inside the `with`, this command's logger writes plain lines to stdout and to a file; other loggers do not."""
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(file, encoding="utf-8")]
    level, propagates = LOGGER.level, LOGGER.propagate
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.handleError = _raise_again
        LOGGER.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            LOGGER.removeHandler(handler)
            handler.flush()
        handlers[1].close()
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates
