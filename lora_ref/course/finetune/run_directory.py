"""A run's directory: whose it is, its log, and the files of its parts.

DIR/run.json         the profile and its settings: the directory belongs to this run alone
DIR/log.txt          what was said
DIR/runs/            one file for each training that is done: an interrupted run goes on after them
DIR/checkpoints/     the training that is not
DIR/base/            the base model, where it was made here
DIR/adapters/        one directory for each adapter, in PEFT's format
DIR/record.json      all of it, checked
"""

import json
import time
from pathlib import Path

from ..._files import write_json
from .settings import flatten

# Settings that may change when a run is resumed: the result is the same.
FREE = ("device", "gradient_accumulation_steps", "gradient_checkpointing", "parallel_adapters", "threads")
NOTHING_DONE = "interrupted before the first step; nothing is lost, and the same command begins anew"


class Workplace:
    """The directory of one run. Nothing is written before `begin`, and after it by the `first` process only.

    Errors: ValueError for a directory that is a file, has another run's run.json, or is not empty and has none.
    """

    def __init__(self, directory: str | Path, name: str, settings: dict, first: bool = True):
        self.directory, self.first, self.start = Path(directory), first, time.perf_counter()
        self.own = json.loads(json.dumps({"profile": name, "settings": settings}))
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"output {directory} is a file; name a directory")
        if self.directory.is_dir() and any(self.directory.iterdir()):
            self._check_owner()

    def _check_owner(self) -> None:
        file = self.directory / "run.json"
        if not file.exists():
            raise ValueError(f"output {self.directory} is not empty and holds no run of this command; name another one")
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
            theirs = flatten(other["settings"]) | {"profile": other["profile"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is no run's description; name another output") from None
        ours = flatten(self.own["settings"]) | {"profile": self.own["profile"]}
        differ = [key for key in sorted(ours | theirs) if key not in FREE and ours.get(key) != theirs.get(key)]
        if differ:
            said = "; ".join(f"{key} was {theirs.get(key)!r}, now {ours.get(key)!r}" for key in differ)
            raise ValueError(f"output {self.directory} is of another run ({said}); name another one, or remove it")

    def begin(self) -> None:
        """Make the directories, and say whose they are."""
        self.earlier = (self.read("clock") or {"seconds": 0.0})["seconds"]
        if self.first:
            for name in ("runs", "checkpoints", "adapters"):
                (self.directory / name).mkdir(parents=True, exist_ok=True)
            if not (self.directory / "run.json").exists():
                write_json(self.own, self.directory / "run.json")

    def say(self, text: str) -> None:
        """Print it and keep it in the log, in the first process."""
        if self.first:
            print(text, flush=True)
            with open(self.directory / "log.txt", "a", encoding="utf-8") as log:
                log.write(text + "\n")

    def seconds(self) -> float:
        """Of the whole run; of a sitting that was killed, what went by until its last part was done."""
        return self.earlier + time.perf_counter() - self.start

    def read(self, name: str) -> dict | None:
        """What is known of a part that is done, None if it is not."""
        file = self.directory / "runs" / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def write(self, name: str, content: dict) -> None:
        """A part is done: keep what came out, drop its checkpoint."""
        if self.first:
            write_json(content, self.directory / "runs" / f"{name}.json")
            self.stamp()
            self.drop(name)

    def drop(self, name: str) -> None:
        """What this checkpoint was for is done."""
        if self.first:
            self.checkpoint(name).unlink(missing_ok=True)

    def stamp(self) -> None:
        """Keep the time, for a sitting that goes on from here."""
        if self.first:
            write_json({"seconds": self.seconds()}, self.directory / "runs" / "clock.json")

    def interrupted(self) -> str:
        """What to say of an interruption outside the steps: whether there was one yet."""
        runs = {path.stem for path in self.directory.glob("runs/*.json") if path.stem.split("-")[0] != "before"}
        if runs - {"clock"} or any(self.directory.glob("checkpoints/*.pt")) or (self.directory / "base").exists():
            return f"interrupted between two steps; {self.directory} holds what was done, and the same command goes on"
        return NOTHING_DONE

    def checkpoint(self, name: str) -> Path:
        return self.directory / "checkpoints" / f"{name}.pt"
