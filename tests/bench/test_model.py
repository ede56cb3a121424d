"""lora_ref.bench.model: the contenders are the same model with the same adapter."""

import torch

from lora_ref import count_parameters
from lora_ref.bench import model as model_bench
from lora_ref.bench.model import Llama, contenders, measure_model, peak, step, summarize_model, token_ids

CPU = torch.device("cpu")
TINY = Llama("tiny", hidden=64, layers=1, batch=2, length=9, r=3)


def test_the_contenders_are_one_model_with_one_adapter():
    models = contenders(TINY, CPU)
    assert list(models) == ["lora_ref", "full", "peft"]
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        losses = {name: model(input_ids=ids, labels=ids).loss.item() for name, model in models.items()}
    assert losses["lora_ref"] == losses["full"] and abs(losses["peft"] - losses["full"]) < 1e-5
    trained = {name: count_parameters(model).trainable for name, model in models.items()}
    assert trained["lora_ref"] == trained["peft"] == 3 * (4 * (64 + 64) + 3 * (64 + 170)) < trained["full"] / 100
    assert trained["full"] == count_parameters(models["full"]).total


def test_a_step_trains():
    model = contenders(TINY, CPU)["lora_ref"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, torch.arange(18).view(2, 9))()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_the_peak_has_weights_gradients_and_moments_and_does_not_grow():
    peaks = {}
    for name, model in contenders(TINY, CPU).items():
        run = step(model, token_ids(TINY, CPU))
        run()
        peaks[name] = peak(model, run, CPU)
        count = count_parameters(model)
        assert 4 * count.total + 12 * count.trainable < peaks[name]
        run()
        assert peak(model, run, CPU) == peaks[name]
    assert peaks["lora_ref"] < peaks["full"] / 2


def test_rows_have_times_and_ratios():
    (row,) = measure_model(TINY, rounds=1, device=CPU)
    assert {name: len(times) for name, times in row["seconds"].items()} == {"lora_ref": 1, "full": 1, "peft": 1}
    assert 0 < row["lora_ref_MiB"] < row["full_MiB"]
    assert row["trained"] == 3 * (4 * 128 + 3 * 234) and row["ratio"]["median"] > 0
    assert "× peft's time" in summarize_model([row])
    assert max(model_bench.CASES, key=lambda case: case.hidden).name == "100 M"
