"""finetune: the whole way from a command to a record, on models of a few kilobytes."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lora_ref import load_adapter
from lora_ref.course.finetune import command_line, finetune, tasks, trial
from lora_ref.course.finetune import experiment as module
from lora_ref.course.finetune.command_line import main
from lora_ref.course.finetune.hub import load_model
from lora_ref.course.finetune.profiles import profile as named
from lora_ref.course.finetune.records import check_record, load_record
from lora_ref.course.finetune.settings import to_profile
from lora_ref.course.finetune.tasks import data_to_text
from tests.course.finetune.tiny_models import e2e, llama, mrpc, roberta, sst2

SMALL = {
    "max_train_samples": 40,
    "max_validation_samples": 6,
    "max_test_samples": 4,
    "steps": 6,
    "batch_size": 8,
    "max_new_tokens": 6,
    "num_evals": 2,
    "num_samples": 2,
    "arms": ("full", "r=3"),
    "lora_alpha": 5.0,
}
BASE = {
    "base_hidden_size": 16,
    "base_num_layers": 1,
    "base_num_heads": 2,
    "base_steps": 4,
    "base_batch_size": 4,
    "base_length": 16,
}


def options(**fields):
    """SMALL and these, as on the command line."""
    words = []
    for name, value in (SMALL | fields).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += ["--" + name.replace("_", "-"), *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return words


def argv(output, profile="cpu-mini", **fields):
    return ["--profile", profile, "--output", str(output), "--quiet", *options(**fields)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A finished run of the text task: (its directory, what it returned)."""
    directory = tmp_path_factory.mktemp("runs") / "done"
    return directory, finetune("cpu-mini", directory, progress=False, model=model, **SMALL)


def tensors(directory):
    return load_file(next(directory.glob("adapters/*/adapter_model.safetensors")))


def test_the_directory_ends_with_the_record_the_adapter_and_the_log(done):
    directory, record = done
    assert sorted(path.name for path in directory.iterdir()) == [
        "adapters", "checkpoints", "log.txt", "record.json", "run.json", "runs",
    ]  # fmt: skip
    assert load_record(directory / "record.json") == json.loads(json.dumps(record)) and check_record(record)
    assert list((directory / "checkpoints").iterdir()) == []
    log = (directory / "log.txt").read_text()
    for word in ("trained", "share", "slot errors", "tokens/s", "peak MB", "base", "full", "r=3", "reference"):
        assert word in log


def test_the_record_says_what_happened(done):
    _, record = done
    full, adapted = record["runs"]
    assert [run["arm"] for run in record["runs"]] == ["full", "r=3"] and record["environment"]["device"] == "cpu"
    assert full["parameters_trained"] == full["parameters"] and full["adapter"] is None
    shapes = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)]  # q, k, v, o, gate, up, down
    assert adapted["parameters_trained"] == 2 * sum(3 * (d + k) for d, k in shapes)
    assert adapted["parameters"] == full["parameters"] + adapted["parameters_trained"]
    assert adapted["adapter"]["r"] == 3 and adapted["adapter"]["lora_alpha"] == 5
    for run in record["runs"]:
        assert len(run["losses"]) == 6 and [point["step"] for point in run["curve"]] == [0, 3, 6]
        assert run["losses"][-1] < run["losses"][0] and run["after"]["loss"] < run["before"]["loss"]
        assert run["curve"][-1]["loss"] == run["validation"] and run["chosen"]
        peak, number = run["peak_bytes"], run["parameters_trained"]
        assert peak["gradients"] == 4 * number and 8 * number <= peak["optimizer"] < 8 * number + 400
        assert [sample["reference"] for sample in run["samples"]] and len(run["samples"]) == 2
    assert full["peak_bytes"]["weights"] < adapted["peak_bytes"]["weights"]
    assert full["curve"][0] == adapted["curve"][0]  # B = 0: both begin at the base


def test_the_adapter_loads_here_and_in_peft_and_gives_the_recorded_loss(done, model):
    from peft import PeftModel

    directory, record = done
    run = record["runs"][1]
    task = tasks.make_task(module.load_tokenizer(model), named("cpu-mini", model=model, **SMALL))
    for load in (lambda base, where: load_adapter(base, where), PeftModel.from_pretrained):
        adapted = load(load_model(model), str(directory / run["adapter_directory"])).eval()
        assert task.held_out_loss(adapted, "test") == pytest.approx(run["after"]["loss"], rel=1e-5)


def test_the_adapter_names_its_base_and_pefts_auto_class_finds_it(done, model):
    from peft import AutoPeftModelForCausalLM

    directory, record = done
    where = directory / record["runs"][1]["adapter_directory"]
    config = json.loads((where / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model
    ids = torch.arange(12)[None]
    with torch.no_grad():
        theirs = AutoPeftModelForCausalLM.from_pretrained(str(where)).eval()(ids).logits
        mine = load_adapter(load_model(model), where).eval()(ids).logits
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-6)


def test_the_same_command_again_gives_the_record_and_another_is_refused(done, model, capsys):
    directory, record = done
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert main(argv(directory, model=model)) == 0
    assert "has this run, done" in capsys.readouterr().out
    assert main(argv(directory, model=model, steps=7)) == 2
    assert "error: output" in (said := capsys.readouterr().err) and "steps was 6, now 7" in said
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_two_processes_end_with_one_processs_adapter_and_one_of_them_writes(done, model, tmp_path):
    directory, record = done
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "lora_ref.course.finetune", *argv(tmp_path / "two", model=model, gradient_accumulation_steps=2)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    found = load_record(tmp_path / "two" / "record.json")
    assert found["environment"]["processes"] == 2 and len(re.findall("written to", ran.stdout)) == 1
    for mine, theirs in zip(found["runs"], record["runs"]):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert mine["after"]["loss"] == pytest.approx(theirs["after"]["loss"], rel=1e-4)
    expected = tensors(directory)
    for name, value in tensors(tmp_path / "two").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    lines = (tmp_path / "two" / "log.txt").read_text().splitlines()
    assert len(lines) == len((directory / "log.txt").read_text().splitlines())


def interrupt(monkeypatch, at, error=None):
    """The at-th batch that is scored in training raises, or sends an interrupt."""
    total, seen = tasks.DataToTextTask.summed_loss, []

    def counted(self, model, rows):
        if model.training:
            seen.append(1)
            if len(seen) == at:
                if error is not None:
                    raise error
                os.kill(os.getpid(), signal.SIGINT)
        return total(self, model, rows)

    monkeypatch.setattr(tasks.DataToTextTask, "summed_loss", counted)


def test_an_interrupted_run_says_how_to_go_on_and_ends_the_same(done, model, tmp_path, monkeypatch, capsys):
    directory, record = done
    with monkeypatch.context() as patch:
        interrupt(patch, 6 + 5)  # in the second arm's fifth step
        assert main(argv(tmp_path / "run", model=model)) == 130
    said = capsys.readouterr().err
    assert "stopped after step 5 of 6" in said and "the same command resumes from there" in said
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["r3-seed0-0.008.pt"] and not (tmp_path / "run" / "record.json").exists()
    interrupt(monkeypatch, 2)  # one step is left: a second one is not made
    assert main(argv(tmp_path / "run", model=model)) == 0
    again = load_record(tmp_path / "run" / "record.json")
    assert again["seconds"] >= sum(run["seconds"] for run in again["runs"])
    for mine, theirs in zip(again["runs"], record["runs"]):
        assert [mine[k] for k in ("losses", "curve", "after", "samples")] == [
            json.loads(json.dumps(theirs[k])) for k in ("losses", "curve", "after", "samples")
        ]
    expected = tensors(directory)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(tmp_path / "run").items())


def test_an_interrupt_before_the_first_step_says_that_nothing_is_lost_and_later_what_is_kept(
    model, tmp_path, monkeypatch, capsys
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    early = "\ninterrupted before the first step; nothing is lost, and the same command starts again\n"
    for where, what in (
        (command_line, "arguments"),
        (module, "load_tokenizer"),
        (module, "make_task"),
        (data_to_text, "bleu"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, interrupted)
            assert main(argv(tmp_path / "run", model=model)) == 130
        assert capsys.readouterr().err == early
        assert (tmp_path / "run").exists() == (what == "bleu")  # the base's scores: the first that is written
    with monkeypatch.context() as patch:
        patch.setattr(trial, "save_adapter", interrupted)  # the second arm's: the first has none
        assert main(argv(tmp_path / "run", model=model)) == 130
    said = f"interrupted between two steps; {tmp_path / 'run'} holds what was done, and the same command resumes"
    assert capsys.readouterr().err == f"\n{said}\n"
    interrupt(monkeypatch, 1)  # all steps were made
    assert main(argv(tmp_path / "run", model=model)) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "words",
    [("--profile", name) for name in ("gpu-offline", "gpu-hub", "gpu-hub-mrpc")]
    + [("--profile", "cpu-mini", "--device", "cuda")],
    ids=" ".join,
)
def test_without_a_gpu_what_wants_one_is_refused_at_the_door(tmp_path, capsys, words):
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: device = 'cuda', but torch sees no GPU. --profile cpu-mini is made for a CPU;")
    assert "--device cpu runs this one there" in said and not (tmp_path / "out").exists()


def test_out_of_memory_names_what_to_lower_and_the_run_goes_on_with_it(done, model, tmp_path, monkeypatch, capsys):
    _, record = done
    with monkeypatch.context() as patch:
        interrupt(patch, 5, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
        assert main(argv(tmp_path / "run", model=model)) == 1
    said = capsys.readouterr().err
    for part in (
        "out of memory at step 4",
        "--gradient-accumulation-steps 2 (now 1)",
        "--gradient-checkpointing true",
        "--batch-size (8)",
        "--max-length",
    ):
        assert part in said, said
    checkpoint = tmp_path / "run" / "checkpoints" / "full-seed0-0.004.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == 3 and "after step 3" in said
    assert main(argv(tmp_path / "run", model=model, gradient_accumulation_steps=2, gradient_checkpointing=True)) == 0
    found = load_record(tmp_path / "run" / "record.json")
    for mine, theirs in zip(found["runs"], record["runs"]):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)


@pytest.mark.parametrize(
    "error, says",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "while evaluating"),
        (RuntimeError("[gloo/pair.cc:537] Connection reset by peer"), "another process of this run has died"),
    ],
)
def test_what_goes_wrong_between_the_steps_is_said_too(model, tmp_path, monkeypatch, capsys, error, says):
    def fails(self, model):
        raise error

    monkeypatch.setattr(tasks.DataToTextTask, "evaluate", fails)
    assert main(argv(tmp_path / "run", model=model)) == 1
    assert says in capsys.readouterr().err


def test_rates_are_chosen_on_validation_examples_and_other_seeds_run_at_the_best(model, tmp_path):
    found = finetune(
        "cpu-mini",
        tmp_path / "run",
        progress=False,
        model=model,
        **SMALL | {"arms": ("r=3",), "lora_lrs": (1e-4, 1e-3), "seeds": (3, 5), "steps": 4, "num_evals": 1},
    )
    first = {run["lr"]: run["validation"] for run in found["runs"] if run["seed"] == 3}
    assert len(first) > 2 and max(first) == pytest.approx(1e-3 * 10 ** (len(first) - 2))  # it went on upwards
    best = min(first, key=first.get)
    assert {(run["seed"], run["lr"]) for run in found["runs"] if run["chosen"]} == {(3, best), (5, best)}
    assert len(list((tmp_path / "run" / "adapters").iterdir())) == len(found["runs"])


def test_runs_that_diverge_are_recorded_apart_and_all_of_them_is_an_error(model, tmp_path, monkeypatch, capsys):
    total = tasks.DataToTextTask.summed_loss

    def explodes(self, model, rows):
        value = total(self, model, rows)
        return value * float("nan") if model.training and self.explode(value) else value

    tasks_ = []
    monkeypatch.setattr(tasks.DataToTextTask, "summed_loss", explodes)
    monkeypatch.setattr(
        tasks.DataToTextTask, "explode", lambda self, value: len(tasks_) < 1 and not tasks_.append(1), False
    )
    changes = SMALL | {"arms": ("full",), "full_lrs": (1e-3, 2e-3), "steps": 2, "num_evals": 1}
    found = finetune("cpu-mini", tmp_path / "one", progress=False, model=model, **changes)
    assert [(run["lr"], run["reason"]) for run in found["diverged"]] == [(1e-3, "the loss is nan at step 0")]
    assert all(run["lr"] > 1e-3 for run in found["runs"])
    monkeypatch.setattr(tasks.DataToTextTask, "explode", lambda self, value: True)
    words = argv(tmp_path / "all", model=model, arms=("full",), full_lrs=(1e-3,))
    assert main(words) == 1
    assert "full diverged at every rate, 0.001; lower full_lrs" in capsys.readouterr().err


SEARCH = SMALL | {
    "arms": ("full", "r=2", "r=3"),
    "lora_lrs": (1e-3, 1e-2),
    "seeds": (0, 4),
    "steps": 4,
    "num_evals": 1,
    "weight_decay": 0.1,
    "max_grad_norm": 0.05,
}


@pytest.fixture(scope="module")
def searched(model, tmp_path_factory):
    """The same search with 1 and with 3 adapters at once: (directory, record) by their number."""
    found = {}
    for n in (1, 3):
        directory = tmp_path_factory.mktemp("search") / str(n)
        found[n] = (
            directory,
            finetune("cpu-mini", directory, progress=False, model=model, parallel_adapters=n, **SEARCH),
        )
    return found


def same(mine, theirs, exact=False):
    """Runs of the same trainings came out alike."""
    key = lambda run: (run["arm"], run["seed"], float(f"{run['lr']:.6g}"))  # noqa: E731
    assert list(map(key, mine)) == list(map(key, theirs))
    for a, b in zip(mine, theirs):
        assert all(a[k] == b[k] for k in ("chosen", "adapter", "parameters", "parameters_trained", "tokens", "before"))
        assert a["losses"] == (b["losses"] if exact else pytest.approx(b["losses"], rel=1e-4))
        chaotic = 3e-3 if a["lr"] > 0.5 else 1e-4
        close = (lambda x: x) if exact else (lambda x: pytest.approx(x, rel=chaotic))
        assert a["validation"] == close(b["validation"]) and a["after"]["loss"] == close(b["after"]["loss"])
        assert [point["loss"] for point in a["curve"]] == close([point["loss"] for point in b["curve"]])


def test_adapters_trained_at_once_come_to_the_same_rates_losses_and_adapters(searched, model):
    (alone, one), (directory, record) = searched[1], searched[3]
    assert check_record(record)["settings"]["optimisation"]["parallel_adapters"] == 3 and record["diverged"] == []
    same(record["runs"], one["runs"])
    assert {run["parallel_adapters"] for run in one["runs"]} == {1}
    numbers = [run["parallel_adapters"] for run in record["runs"] if run["arm"] != "full" and run["seed"] == 0]
    assert {1, 3} <= set(numbers) <= {1, 2, 3} and numbers.count(3) == 3
    assert {run["parallel_adapters"] for run in record["runs"] if run["arm"] == "full" or run["seed"] == 4} == {1}
    assert {run["arm"] for run in record["runs"] if run["seed"] == 4} == {"full", "r=2", "r=3"}
    expected = {path.parent.name: load_file(path) for path in alone.glob("adapters/*/*.safetensors")}
    found = {path.parent.name: load_file(path) for path in directory.glob("adapters/*/*.safetensors")}
    assert set(found) == set(expected)
    for name in [name for name in found if not name.endswith("-1")]:  # at the rate 1 roundings grow
        for key, value in found[name].items():
            torch.testing.assert_close(value, expected[name][key], rtol=1e-2, atol=1e-4)
    task = tasks.make_task(module.load_tokenizer(model), named("cpu-mini", model=model, **SEARCH))
    for run in record["runs"]:
        if run["parallel_adapters"] > 1:
            adapted = load_adapter(load_model(model), directory / run["adapter_directory"]).eval()
            assert task.held_out_loss(adapted, "test") == pytest.approx(run["after"]["loss"], rel=1e-5)
    assert list((directory / "checkpoints").iterdir()) == []


def test_at_once_the_speed_and_the_memory_are_those_of_all(searched):
    _, record = searched[3]
    run = next(run for run in record["runs"] if run["parallel_adapters"] == 3)
    group = [other for other in record["runs"] if other["step_ms"] == run["step_ms"]]
    assert len(group) == 3 and len({json.dumps([o["peak_bytes"], o["seconds"]]) for o in group}) == 1
    assert run["peak_bytes"]["gradients"] == 4 * sum(other["parameters_trained"] for other in group)
    _, one = searched[1]
    single = next(o for o in one["runs"] if (o["arm"], o["lr"]) == (run["arm"], run["lr"]))
    held = sum(4 * o["parameters_trained"] for o in group) - 4 * run["parameters_trained"]
    assert run["peak_bytes"]["weights"] - single["peak_bytes"]["weights"] - held < 1000  # the base is there once


def test_interrupted_within_a_group_it_goes_on_and_ends_the_same(searched, model, tmp_path, monkeypatch, capsys):
    total, seen = tasks.DataToTextTask.summed_loss, []

    def counted(self, model, rows, *copies):
        if model.training and copies:
            seen.append(copies)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGINT)
        return total(self, model, rows, *copies)

    monkeypatch.setattr(tasks.DataToTextTask, "summed_loss", counted)
    words = argv(tmp_path / "run", model=model, parallel_adapters=3, **{k: v for k, v in SEARCH.items() if k != "arms"})
    words += ["--arms", *SEARCH["arms"]]
    assert main(words) == 130 and "stopped after step 3 of 4" in capsys.readouterr().err
    [left] = (tmp_path / "run" / "checkpoints").iterdir()
    assert re.fullmatch(r"r2-seed0-0.001-and-2-more-[0-9a-f]{12}\.pt", left.name)
    write, members = module.RunDirectory.write, []

    def killed(self, name, content):
        if content.get("parallel_adapters") == 3:
            members.append(name)
            if len(members) == 2:
                raise KeyboardInterrupt
        write(self, name, content)

    with monkeypatch.context() as patch:  # then between the files of two members
        patch.setattr(module.RunDirectory, "write", killed)
        assert main(words) == 130
    assert left.exists() and len(members) == 2 and len(seen) == 4
    assert main(words) == 0
    assert (3,) not in seen[4:]  # the first group did not train again
    _, record = searched[3]
    found = load_record(tmp_path / "run" / "record.json")
    same(found["runs"], record["runs"], exact=True)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_begun_with_more_at_once_it_may_go_on_with_fewer(searched, model, tmp_path, monkeypatch, capsys):
    total = tasks.DataToTextTask.summed_loss

    def full(self, model, rows, *copies):
        if copies == (3,) and model.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return total(self, model, rows, *copies)

    monkeypatch.setattr(tasks.DataToTextTask, "summed_loss", full)
    with pytest.raises(MemoryError, match=r"or --parallel-adapters 1 \(now 3\), which change no result"):
        finetune("cpu-mini", tmp_path, progress=False, model=model, parallel_adapters=3, **SEARCH)
    record = finetune("cpu-mini", tmp_path, progress=False, model=model, parallel_adapters=1, **SEARCH)
    same(record["runs"], searched[1][1]["runs"])


def test_of_adapters_at_once_those_that_diverge_are_recorded_apart(searched, model, tmp_path, monkeypatch):
    total, lost = tasks.DataToTextTask.summed_loss, []

    def explodes(self, model, rows, *copies):
        value = total(self, model, rows, *copies)
        if model.training and copies == (3,) and not lost:
            lost.append(1)
            return value * torch.tensor([1.0, 1.0, float("nan")])
        return value

    monkeypatch.setattr(tasks.DataToTextTask, "summed_loss", explodes)
    changes = SEARCH | {"arms": ("r=2", "r=3"), "lora_lrs": (1e-3, 1e-2), "seeds": (0,)}
    found = finetune("cpu-mini", tmp_path, progress=False, model=model, parallel_adapters=3, **changes)
    assert [tuple(run.values()) for run in found["diverged"]] == [("r=3", 0, 1e-3, "the loss is nan at step 0")]
    theirs = {(run["arm"], run["lr"]): run["losses"] for run in searched[3][1]["runs"] if run["seed"] == 0}
    for arm, rate in (("r=2", 1e-3), ("r=2", 1e-2), ("r=3", 1e-2)):
        [run] = [run for run in found["runs"] if (run["arm"], run["lr"]) == (arm, rate)]
        assert run["losses"] == pytest.approx(theirs[arm, rate], rel=1e-6)
    assert not (tmp_path / "adapters" / "r3-seed0-0.001").exists()


def test_when_all_at_once_diverge_it_is_said_of_each_and_is_an_error(model, tmp_path, monkeypatch, capsys):
    total = tasks.DataToTextTask.summed_loss

    def explodes(self, model, rows, *copies):
        return total(self, model, rows, *copies) * (float("inf") if model.training else 1)

    monkeypatch.setattr(tasks.DataToTextTask, "summed_loss", explodes)
    changes = {"arms": ("r=3",), "lora_lrs": (1e-3, 1e-2), "parallel_adapters": 2, "model": model}
    assert main(argv(tmp_path, **changes)) == 1
    said = capsys.readouterr()
    assert said.out.count("diverged: the loss is inf at step 0") == 2
    assert "r=3 diverged at every rate, 0.001, 0.01; lower lora_lrs" in said.err


def test_a_run_that_ends_with_a_validation_loss_that_is_not_finite_has_diverged(model, tmp_path, monkeypatch):
    held_out, seen = tasks.DataToTextTask.held_out_loss, []

    def explodes(self, model, part):
        seen.append(part)
        return float("nan") if len(seen) == 3 else held_out(self, model, part)

    monkeypatch.setattr(tasks.DataToTextTask, "held_out_loss", explodes)
    changes = SMALL | {"arms": ("full",), "full_lrs": (1e-3, 2e-3), "steps": 2, "num_evals": 1}
    found = finetune("cpu-mini", tmp_path, progress=False, model=model, **changes)
    assert [(run["lr"], run["reason"]) for run in found["diverged"]] == [(1e-3, "the validation loss is nan at step 2")]


def test_several_processes_train_no_adapters_at_once(model, tmp_path, monkeypatch, capsys):
    accelerator = module.make_accelerator(named("cpu-mini").system)
    fake = type("Two", (), {"num_processes": 2, "device": accelerator.device})()
    monkeypatch.setattr(module, "make_accelerator", lambda system: fake)
    assert main(argv(tmp_path / "out", model=model, parallel_adapters=2)) == 2
    assert "parallel_adapters = 2" in (said := capsys.readouterr().err) and "--parallel-adapters 1" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "frozen_dtype": "bf16", "gradient_checkpointing": True, "lora_dropout": 0.1},
        {
            "precision": "bf16",
            "frozen_dtype": "bf16",
            "gradient_checkpointing": True,
            "lora_dropout": 0.1,
            "parallel_adapters": 2,
            "lora_lrs": (8e-3, 9e-3),
            "gradient_accumulation_steps": 2,
        },
        {"use_rslora": True, "target_modules": ("q_proj", "embed_tokens")},
    ],
    ids=["16 bits", "16 bits at once", "tied embeddings"],
)
def test_other_ways_to_train_end_with_an_adapter_too(model, tmp_path, changes):
    from peft import PeftModel

    found = finetune(
        "cpu-mini", tmp_path, progress=False, model=model, **SMALL | {"arms": ("r=3",), "steps": 3} | changes
    )
    assert found["runs"][0]["after"]["loss"] < found["runs"][0]["before"]["loss"]
    where = tmp_path / found["runs"][0]["adapter_directory"]
    assert {value.dtype for value in tensors(tmp_path).values()} == {torch.float32}
    load_adapter(load_model(model), where)
    PeftModel.from_pretrained(load_model(model), str(where))


def test_hub_form_e2e_from_a_local_directory(model, tmp_path):
    found = finetune(
        "gpu-hub",
        tmp_path / "run",
        progress=False,
        model=model,
        dataset=e2e(tmp_path / "e2e"),
        **SMALL
        | {"arms": ("r=3",), "lora_lrs": (1e-2,), "seeds": (0,), "steps": 3, "max_train_samples": 20, "device": "cpu"},
    )
    assert found["slot_rule"] == "verbatim" and found["settings"]["system"]["precision"] == "bf16"
    assert found["runs"][0]["after"]["loss"] < found["runs"][0]["before"]["loss"]


@pytest.mark.parametrize("profile, data", [("gpu-hub-mrpc", mrpc), ("gpu-hub-sst2", sst2)])
def test_glue_from_local_directories_trains_head_and_adapter(tmp_path, profile, data):
    from peft import PeftModel

    name = roberta(tmp_path / "model")
    found = finetune(
        profile,
        tmp_path / "run",
        progress=False,
        model=name,
        dataset=data(tmp_path / "data"),
        **SMALL
        | {
            "max_length": 40,
            "max_train_samples": 20,
            "lora_lrs": (1e-2,),
            "full_lrs": (1e-2,),
            "seeds": (1,),
            "device": "cpu",
        },
    )
    full, adapted = found["runs"]
    assert all(0 <= run["after"]["accuracy"] <= 1 and run["after"]["f1"] is not None for run in found["runs"])
    assert full["before"] == adapted["before"] and adapted["losses"] != full["losses"]
    head = 16 * 16 + 16 + 2 * 16 + 2
    assert adapted["parameters_trained"] == head + 2 * 2 * 3 * (16 + 16)
    where = str(tmp_path / "run" / adapted["adapter_directory"])
    task = tasks.make_task(module.load_tokenizer(name), to_profile(found["settings"]))
    for load in (load_adapter, PeftModel.from_pretrained):
        base = load_model(name, "classification", 2, seed=1)
        assert task.evaluate(load(base, where).eval())[0]["accuracy"] == adapted["after"]["accuracy"]


def test_offline_pretrains_a_base_and_fine_tunes_it(tmp_path, monkeypatch):
    from lora_ref.course.finetune import base_model as new_base
    from lora_ref.course.text.corpus import Corpus

    documents = [f"The function number {i} returns the value of its argument." for i in range(60)]
    monkeypatch.setattr(new_base, "load_corpus", lambda packages: Corpus(documents[:50], documents[50:]))
    changes = BASE | {"arms": ("r=1", "r=3"), "lora_lrs": (1e-2,), "seeds": (0,), "device": "cpu", "steps": 3}
    monkeypatch.chdir(tmp_path)
    found = finetune("gpu-offline", "run", progress=False, **SMALL | changes)
    tmp_path /= "run"
    assert found["base_bits_per_byte"] > 0 and found["model"] == "new"
    assert {path.name for path in (tmp_path / "base").iterdir()} >= {"config.json", "model.safetensors", "bits.json"}
    base = load_model(str(tmp_path / "base"))
    adapter = tmp_path / found["runs"][1]["adapter_directory"]
    load_adapter(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")  # from wherever it is loaded
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"steps": 1}, "steps = 1"),
        ({"batch_size": 64, "max_train_samples": 20}, "batch_size = 64, but there are 20 examples"),
        ({"target_modules": ["q_prjo"]}, "'q_proj'"),
        (
            {"arms": ["full", "r=9"], "target_modules": ["k_proj"]},
            "arms has 'r=9', but model.layers.0.self_attn.k_proj",
        ),
        ({"max_length": 257}, "max_length = 257 tokens, but"),
        ({"max_new_tokens": 250}, "max_new_tokens and the longest prompt"),
        ({"precision": "fp16"}, "needs a GPU"),
        ({"model": "no/such/model"}, "no/such/model does not exist"),
        ({"dataset": "no/such/data"}, "no/such/data does not exist"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(model, tmp_path, capsys, changes, says):
    assert main(argv(tmp_path / "out", **{"model": model} | changes)) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_tokeniser_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    name = llama(tmp_path / "model", vocab_size=1000)
    assert main(argv(tmp_path / "out", model=name)) == 2
    assert "the tokeniser has 2,048 tokens, the model's embeddings 1,000 rows" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_names_have_near_matches(tmp_path, capsys):
    assert main(["--profile", "cpu-mni", "--output", str(tmp_path / "out")]) == 2
    assert "'cpu-mini'" in capsys.readouterr().err
    assert main([*argv(tmp_path / "out"), "--stepz", "3"]) == 2
    assert "'--steps'" in capsys.readouterr().err
