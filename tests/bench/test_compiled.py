"""lora_ref.bench.compiled: what is compiled computes the same, in one graph; and the rows.

Whole models are compiled by the backend aot_eager, which traces the forward, derives the backward and runs both as they
are: a graph break or another gradient shows there. Inductor would take half a minute and more for each; it compiles
one block.
"""

import os
import shutil

import pytest
import torch

from lora_ref import LoRAConfig, add_lora
from lora_ref.bench import compiled as compile_bench
from lora_ref.bench.benchmarks import BENCHMARKS
from lora_ref.bench.command_line import main
from lora_ref.bench.compiled import measure_compiled, no_compiler, summarize_compiled
from lora_ref.bench.model import Llama, contenders
from lora_ref.bench.report import table

CPU = torch.device("cpu")
TINY = Llama("tiny", hidden=64, layers=2, batch=2, length=9, r=3)
IDS = torch.arange(18).view(2, 9)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of another test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def moved(model):
    """B is 0 at the start, and A's gradient with it: both get numbers of their own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model, loss):
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(found, torch.autograd.grad(loss, list(found.values())), strict=True))


def assert_same(model, compiled, loss):
    """`loss` of the model as it is and as compiled, and all gradients, to float32's rounding."""
    losses = loss(model), loss(compiled)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    eager, found = (gradients(model, one) for one in losses)
    assert len(eager) > 1
    for name, expected in eager.items():
        assert expected.norm() > 0 and (found[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("name", ["lora_ref", "full", "peft"])
def test_a_compiled_model_is_one_graph_with_the_loss_and_the_gradients_of_the_eager_one(name):
    model = moved(contenders(TINY, CPU)[name])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(model, compiled, lambda model: model(input_ids=IDS, labels=IDS).loss)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler: install g++")
def test_inductor_computes_an_adapted_block_as_it_is_eagerly():
    block = torch.nn.Sequential(torch.nn.Linear(64, 170), torch.nn.SiLU(), torch.nn.Linear(170, 64))
    model = moved(add_lora(block, LoRAConfig(r=3, lora_alpha=6, target_modules="all-linear"))).train()
    x = torch.randn(18, 64, generator=torch.Generator().manual_seed(0))
    assert_same(model, torch.compile(model, fullgraph=True), lambda model: model(x).square().mean())


def test_rows_are_of_each_contender_eager_and_compiled(monkeypatch):
    monkeypatch.setattr(compile_bench, "BACKEND", "aot_eager")
    found = list(measure_compiled(TINY, rounds=2, device=CPU))
    assert [row["contender"] for row in found] == ["lora_ref", "full", "peft"]
    for row in found:
        name = row["contender"]
        assert list(row["seconds"]) == [f"{name}, eager", f"{name}, compiled"]
        assert all(len(times) == 2 and row["compile_s"] > max(times) for times in row["seconds"].values())
        assert row["graphs"] == 1 and row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
        ratios = [c / e for e, c in zip(*row["seconds"].values(), strict=True)]
        assert row["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
        assert 0 < row["eager_MiB"] and 0 < row["compiled_MiB"]
    assert found[2]["eager_÷peft"] == found[2]["compiled_÷peft"] == 1 != found[0]["compiled_÷peft"]
    assert "compiled lora_ref step" in summarize_compiled(found) and "× compiled peft's" in summarize_compiled(found)
    assert "compiled ÷peft" in table("compile", BENCHMARKS["compile"], found)


def test_without_peft_the_others_are_timed(monkeypatch):
    monkeypatch.setattr(compile_bench, "BACKEND", "eager")
    monkeypatch.setattr(
        compile_bench, "contenders", lambda case, device: {name: both[name] for name in both if name != "peft"}
    )
    both = contenders(TINY, CPU)
    found = list(measure_compiled(TINY, rounds=1, device=CPU))
    assert [row["compiled_÷peft"] for row in found] == [None, None] and "peft" not in summarize_compiled(found)


def test_a_missing_compiler_is_said_before_any_timing(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no working C++ compiler found\nand more that nobody needs")

    monkeypatch.setattr(compile_bench, "BACKEND", broken)
    monkeypatch.setattr(compile_bench, "paired", lambda *a, **k: pytest.fail("the benchmark ran"))
    with pytest.raises(SystemExit) as stop:
        main(["compile", "--quick"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "cannot build code for cpu here" in message and "needs g++" in message
    assert "no working C++ compiler found" in message and "nobody needs" not in message
    assert "triton" in no_compiler("cuda")
    monkeypatch.setattr(compile_bench, "BACKEND", "eager")
    assert no_compiler("cpu") is None


def test_the_summary_of_a_case_that_was_interrupted_before_lora_ref_says_so():
    assert summarize_compiled([{"contender": "full"}]) == "No compiled lora_ref step was timed"
