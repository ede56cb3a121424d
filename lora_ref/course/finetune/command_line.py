"""The command python -m lora_ref.course.finetune: its options, its exit codes, what it prints of an error.

Exit codes: 0 done; 1 out of memory, diverged, or another process died; 2 refused before anything was written; 130
interrupted.
"""

import argparse
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

from ..training.errors import out_of_memory, process_lost, reason
from .config import Profile
from .experiment import finetune
from .profiles import PROFILES
from .run_directory import NOTHING_DONE
from .settings import RENAMED, SETTINGS, Setting, did_you_mean

ABOUT = (
    "Fine-tune a language model in full and with LoRA, and compare. The profile sets all defaults; an option changes "
    "one of its settings."
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    rank = int(os.environ.get("RANK", 0))
    if isinstance(sys.stdout, io.TextIOWrapper):  # the encoding of a file or a pipe may lack α or half a letter
        sys.stdout.reconfigure(errors="replace")
    try:
        args, overrides = arguments(argv)
        finetune(args.profile, args.output, progress=not args.quiet, **overrides)
    except (ValueError, TypeError, ImportError, OSError) as error:
        return _fail(f"error: {error}", 2, rank == 0)
    except (MemoryError, FloatingPointError) as error:
        return _fail(f"error: process {rank}: {error}", 1)
    except KeyboardInterrupt as error:
        return _fail(f"\n{str(error) or NOTHING_DONE}", 130, rank == 0)
    except RuntimeError as error:
        return _fail(f"error: process {rank}: {_cause(error)}", 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _fail(message: str, code: int, shown: bool = True) -> int:
    if shown:
        print(message, file=sys.stderr)
    return code


def _cause(error: RuntimeError) -> str:
    """What to print of an error between the steps (in training they are a MemoryError …); others are raised again."""
    if out_of_memory(error):
        return (
            f"out of memory while evaluating ({reason(error)}); lower --max-length or --max-new-tokens, in a new output"
        )
    if "another process" in str(error):
        return str(error)
    if process_lost(error):
        return f"another process of this run has died ({reason(error)}); the same command resumes the run"
    raise error


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, object]]:
    """(--profile, --output, --quiet; the settings that were given, by flat name). Errors: ValueError, near matches."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        raise ValueError(f"{unknown[0]!r} is a value too many; --help shows as X [X ...] what takes several")
    if unknown:
        raise ValueError(_unknown(unknown[0].partition("=")[0]))
    if missing := [f"--{name}" for name in ("profile", "output") if getattr(args, name) is None]:
        raise ValueError(f"{' and '.join(missing)} must be given, as in --profile cpu-mini --output DIR; see --help")
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    return args, {name: parse(name, words if isinstance(words, list) else [words]) for name, words in given.items()}


def _unknown(word: str) -> str:
    options = {option(old): option(new) for old, new in RENAMED.items()}
    if word in options:
        return f"{word} is called {options[word]} now"
    return f"{word} is no option; {did_you_mean(word, [*map(option, SETTINGS), '--profile', '--output', '--quiet'])}"


def parse(name: str, words: list[str]) -> object:
    """The value of a setting as the command line gives it. Errors: ValueError with the setting."""
    setting = SETTINGS[name]
    if not setting.is_list and len(words) != 1:
        raise ValueError(f"{name} takes one value, got {' '.join(words)}")
    values = tuple(_parse_word(setting, word) for word in words)
    return values if setting.is_list else values[0]


def _parse_word(setting: Setting, word: str) -> object:
    if setting.kind is bool:
        if word.lower() not in ("true", "false"):
            raise ValueError(f"{setting.name} takes true or false, got {word}")
        return word.lower() == "true"
    try:
        return setting.kind(word)
    except ValueError:
        number = "an integer" if setting.kind is int else "a number"
        raise ValueError(f"{setting.name} takes {number}, got {word!r}") from None


class _Parser(argparse.ArgumentParser):
    """One whose errors are ValueErrors, without forty lines of usage before them."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lora_ref.course.finetune",
        usage="%(prog)s --profile NAME --output DIR [--quiet] [--FIELD X ...]",
        description=ABOUT,
        allow_abbrev=False,
    )
    parser.add_argument("--profile", metavar="NAME", help=", ".join(PROFILES))
    parser.add_argument("--output", metavar="DIR", type=Path, help="the run's directory")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    groups = {name: parser.add_argument_group(name, info.description) for name, info in Profile.model_fields.items()}
    for setting in SETTINGS.values():
        choices = ("true", "false") if setting.kind is bool else setting.choices
        groups[setting.group].add_argument(
            option(setting.name),
            nargs="+" if setting.is_list else None,
            metavar="|".join(choices) or "X",
            help="; ".join(filter(None, (setting.description, setting.range))).replace("%", "%%"),
        )
    return parser


def option(name: str) -> str:
    """--max-length for max_length."""
    return "--" + name.replace("_", "-")
