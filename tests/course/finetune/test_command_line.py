"""course/finetune/command_line.py: every setting is an option, and the options are what the declaration says."""

import pytest

from lora_ref.course.finetune.command_line import arguments, option, parse
from lora_ref.course.finetune.settings import RENAMED, SETTINGS

MUST = ["--profile", "cpu-mini", "--output", "out"]


def test_every_setting_is_an_option_and_the_command_line_gives_what_the_call_gives():
    words = {str: "cuda", int: "3", float: "0.5", bool: "true"}
    argv = ["--profile", "cpu-mini", "--output", "out"]
    for name, setting in SETTINGS.items():
        argv += ["--" + name.replace("_", "-"), words[setting.kind]]
    args, given = arguments(argv)
    assert set(given) == set(SETTINGS) and str(args.output) == "out" and not args.quiet
    assert given["steps"] == 3 and given["use_rslora"] is True and given["lora_lrs"] == (0.5,)
    assert given["base_hidden_size"] == 3 and given["model"] == "cuda"
    assert arguments(["--profile", "p", "--output", "o", "--full-lrs", "1e-3", "2e-3"])[1] == {"full_lrs": (1e-3, 2e-3)}


def test_mistakes_on_the_command_line(refused):
    refused(lambda: arguments([*MUST, "--step", "3"]), "--step is no option", "'--steps'")
    refused(lambda: parse("steps", ["three"]), "steps takes an integer", "'three'")
    refused(lambda: parse("max_grad_norm", ["x"]), "max_grad_norm takes a number")
    refused(lambda: parse("steps", ["3", "4"]), "steps takes one value", "3 4")
    refused(lambda: parse("gradient_checkpointing", ["yes"]), "gradient_checkpointing takes true or false", "yes")
    refused(lambda: arguments([*MUST, "--steps", "3", "4"]), "'4' is a value too many", "--help")
    refused(lambda: arguments([*MUST, "--steps"]), "argument --steps: expected one argument; see --help")
    missing = {("--profile", "p"): "--output", ("--output", "o"): "--profile", (): "--profile and --output"}
    for argv, names in missing.items():
        refused(lambda: arguments(list(argv)), f"{names} must be given, as in --profile cpu-mini --output DIR; see")  # noqa: B023


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_old_options_are_refused_with_the_new_one(old, new, refused):
    refused(lambda: arguments([*MUST, option(old), "3"]), f"{option(old)} is called {option(new)} now")
    refused(lambda: arguments([*MUST, f"{option(old)}=3"]), f"{option(old)} is called {option(new)} now")


def test_help_shows_what_an_option_takes_and_that_the_profile_sets_all_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        arguments(["--help"])
    said, lines, name = capsys.readouterr().out, {}, None
    for line in said.splitlines():
        if line.startswith("  --"):
            name = line.split()[0]
            lines[name] = " ".join(line.split()[1:])
        elif line.startswith("   ") and name:
            lines[name] += " " + line.strip()
        else:
            name = None
    assert ended.value.code == 0 and "and compare. The profile sets all defaults;" in " ".join(said.split())
    assert said.startswith("usage: python -m lora_ref.course.finetune --profile NAME --output DIR [--quiet] [--FIELD X")
    assert lines["--device"].startswith("auto|cpu|cuda") and lines["--gradient-checkpointing"].startswith("true|false")
    assert lines["--steps"] == "X optimizer steps of one training; at least 2 steps"
    assert lines["--seeds"].startswith("X [X ...] seeds")
    assert {option(name) for name in SETTINGS} | {"--profile", "--output", "--quiet"} == set(lines)
    for group in ("data", "adapter", "optimisation", "system", "base"):
        assert f"\n{group}:\n" in said
