"""course/profiles.py: every field of every profile has a range, on the command line and in a call."""

from dataclasses import asdict, fields

import pytest

from lora_ref.course.finetune.profiles import PROFILES, Profile, arguments, parse, profile


def test_the_profiles_of_the_table_are_there_and_fit_what_they_are_for():
    assert {"cpu-mini", "gpu-hub", "gpu-hub-mrpc", "gpu-hub-sst2", "gpu-offline"} <= set(PROFILES)
    mini, offline = PROFILES["cpu-mini"], PROFILES["gpu-offline"]
    assert {name: p.device for name, p in PROFILES.items()} == {
        n: "cpu" if n == "cpu-mini" else "cuda" for n in PROFILES
    }
    assert (mini.model, mini.data, mini.device, mini.arms) == ("prose_llama", "restaurants", "cpu", ("full", "r=8"))
    assert offline.model == "new" and len(offline.seeds) >= 3 and len(offline.arms) >= 3
    searched = (len(offline.arms) - 1) * len(offline.lora_rates)
    assert {name: p.together for name, p in PROFILES.items() if p.together > 1} == {"gpu-offline": searched}
    for name, p in PROFILES.items():
        if name.startswith("gpu-hub"):
            assert "/" in p.model and "/" in p.data and p.precision == "bf16" and "full" in p.arms
        if name != "cpu-mini":
            assert len(p.full_rates) >= 3 and len(p.lora_rates) >= 3, f"{name} does not tune its rates"


def test_a_field_can_be_overridden_and_the_table_stays_as_it_is():
    before = asdict(PROFILES["cpu-mini"])
    p = profile("cpu-mini", steps=7, arms=["r=3"], lora_alpha=5)
    assert (p.steps, p.arms, p.lora_alpha, p.batch) == (7, ("r=3",), 5.0, 16)
    assert asdict(PROFILES["cpu-mini"]) == before


@pytest.mark.parametrize(
    "overrides, says",
    [
        ({"step": 3}, ["no field 'step'", "'steps'"]),
        ({"steps": 1}, ["steps = 1", "at least 2 steps"]),
        ({"steps": 2.5}, ["steps must be int", "2.5"]),
        ({"steps": True}, ["steps must be int", "True"]),
        ({"lora_alpha": 0}, ["lora_alpha = 0"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha = nan"]),
        ({"lora_dropout": 1.0}, ["lora_dropout = 1.0", "between 0 and 0.99"]),
        ({"full_rates": ()}, ["full_rates must be a list"]),
        ({"full_rates": 1e-3}, ["full_rates must be a list", "0.001"]),
        ({"lora_rates": (1e-3, 1e-3)}, ["lora_rates", "twice"]),
        ({"arms": "full"}, ["arms must be a list", "'full'"]),
        ({"arms": ("full", "r=0")}, ["'r=0'", "r=8"]),
        ({"arms": ("lora",)}, ["'lora'", "'full'"]),
        ({"precision": "bf61"}, ["'bf61'", "'bf16'"]),
        ({"task": "data2text"}, ["'data2text'", "'data-to-text'"]),
        ({"device": "gpu"}, ["device = 'gpu'", "choose one of 'auto', 'cpu', 'cuda'"]),
        ({"checkpointing": 1}, ["checkpointing must be bool", "1"]),
        ({"model": ""}, ["model is empty"]),
        ({"accumulate": 3}, ["batch = 16", "accumulate = 3", "equal size"]),
        ({"task": "classification"}, ["prose_llama", "classifier"]),
        ({"model": "new", "base_hidden": 30, "base_heads": 4}, ["base_hidden = 30", "2·base_heads = 8"]),
        ({"together": 0}, ["together = 0", "at least 1 adapters"]),
        ({"together": 2, "precision": "fp16"}, ["together = 2", "fp16", "together = 1"]),
        ({"together": 2, "task": "classification", "model": "roberta-base"}, ["together = 2", "head", "together = 1"]),
        ({"base_length": 513}, ["base_length = 513", "between 8 and 512"]),
    ],
)
def test_bad_fields_are_refused(overrides, says, refused):
    refused(lambda: profile("cpu-mini", **overrides), *says)


def test_unknown_profiles_are_refused_with_near_matches(refused):
    refused(lambda: profile("cpu_mini"), "'cpu_mini' is unknown", "'cpu-mini'")
    refused(lambda: profile("zzz"), "there are cpu-mini, gpu-hub")


def test_every_field_is_an_option_and_the_command_line_gives_what_the_call_gives():
    words = {str: "cuda", int: "3", float: "0.5", bool: "true"}
    argv = ["--profile", "cpu-mini", "--output", "out"]
    for f in fields(Profile):
        kind = f.type.__args__[0] if hasattr(f.type, "__args__") else f.type
        argv += ["--" + f.name.replace("_", "-"), words[kind]]
    args, given = arguments(argv, "about")
    assert set(given) == {f.name for f in fields(Profile)} and str(args.output) == "out" and not args.quiet
    assert given["steps"] == 3 and given["use_rslora"] is True and given["lora_rates"] == (0.5,)
    assert arguments(["--profile", "p", "--output", "o", "--full-rates", "1e-3", "2e-3"], "")[1] == {
        "full_rates": (1e-3, 2e-3)
    }


def test_mistakes_on_the_command_line(refused):
    must = ["--profile", "cpu-mini", "--output", "out"]
    refused(lambda: arguments([*must, "--step", "3"], ""), "--step is no option", "'--steps'")
    refused(lambda: parse("steps", ["three"]), "steps takes an integer", "'three'")
    refused(lambda: parse("clip", ["x"]), "clip takes a number")
    refused(lambda: parse("steps", ["3", "4"]), "steps takes one value", "3 4")
    refused(lambda: parse("checkpointing", ["yes"]), "checkpointing takes true or false", "yes")
    refused(lambda: arguments([*must, "--steps", "3", "4"], ""), "'4' is a value too many", "--help")
    refused(lambda: arguments([*must, "--steps"], ""), "argument --steps: expected one argument; see --help")
    lacking = {("--profile", "p"): "--output", ("--output", "o"): "--profile", (): "--profile and --output"}
    for argv, names in lacking.items():
        refused(lambda: arguments(list(argv), ""), f"{names} must be given, as in --profile cpu-mini --output DIR; see")


def test_help_shows_what_an_option_takes_and_that_the_profile_sets_all_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        arguments(["--help"], "About.")
    said, lines = capsys.readouterr().out, {}
    for line in said.splitlines():
        if line.startswith("  --"):
            lines[line.split()[0]] = " ".join(line.split()[1:])
    assert ended.value.code == 0 and "About. The profile sets all defaults;" in " ".join(said.split())
    assert said.startswith("usage: python -m lora_ref.course.finetune --profile NAME --output DIR [--quiet] [--FIELD X")
    assert lines["--device"].startswith("auto|cpu|cuda") and lines["--checkpointing"].startswith("true|false")
    assert lines["--steps"] == "X steps of a run" and lines["--seeds"].startswith("X [X ...] rates")
    assert {f"--{f.name.replace('_', '-')}" for f in fields(Profile)} | {"--profile", "--output", "--quiet"} == set(
        lines
    )


def test_the_warm_up_is_a_share_of_the_steps_and_never_all_of_them():
    assert profile("cpu-mini", steps=50, warmup=0.1).warmup_steps == 5
    assert profile("cpu-mini", steps=2, warmup=0.9).warmup_steps == 1
