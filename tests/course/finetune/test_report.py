"""course/report.py: the numbers of a run, and the table, agree with each other."""

import pytest

from lora_ref.course.finetune.report import peak, shown_samples, speed, summary, table, training_results
from lora_ref.course.training import History


def history(**changes):
    made = History([1.0] * 5, [(5, 0.5)], step_seconds=[9.0, 1.0, 2.0, 7.0, 1.0])
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_the_first_step_and_the_measured_one_do_not_count_for_the_speed():
    found = speed(history(), [10, 20, 30, 40, 50], memory_step=3)
    assert found["tokens"] == 150 and found["tokens_per_s"] == pytest.approx((20 + 30 + 50) / 4)
    assert found["step_ms"] == {"q1": 1000.0, "median": 1000.0, "q3": 1500.0}
    both = speed(history(step_seconds=[2.0, 6.0]), [10, 30], memory_step=1)
    assert both["tokens_per_s"] == 5.0


def test_the_peaks_parts_add_up_to_it():
    memory = {"peak": 100, "weights": 30, "gradients": 5, "optimizer": 10}
    found = peak(history(memory=memory))
    assert found == {"total": 100, "weights": 30, "gradients": 5, "optimizer": 10, "activations": 55}
    assert set(peak(history()).values()) == {None} and set(peak(history())) == set(found)


def run(arm, loss, chosen=True, total=2_000_000, parallel_adapters=1, speed=1234.0):
    measures = {"loss": loss, "bleu": 40.0, "slot_errors": 0.25, "accuracy": None, "f1": None}
    return {
        "arm": arm,
        "lr": 1e-3,
        "chosen": chosen,
        "parallel_adapters": parallel_adapters,
        "parameters_trained": 250,
        "parameters": 1000,
        "tokens_per_s": speed,
        "step_ms": {"median": 50.0},
        "peak_bytes": {"total": total},
        "validation": 0.5,
        "seconds": 3.0,
        "before": measures | {"loss": 4.0},
        "after": measures,
        "samples": [{"input": "asked", "reference": "good", "before": "bad\n", "after": f"by {arm}"}],
    }


ENVIRONMENT = {"device_name": "A processor", "processes": 1, "threads": 2}


def test_the_table_has_the_base_and_each_arms_mean_over_seeds_at_its_best_rate():
    runs = [run("full", 1.0), run("full", 3.0), run("full", 100.0, chosen=False), run("r=3", 2.0, total=None)]
    lines = table({"runs": runs, "environment": ENVIRONMENT, "seconds": 60}).splitlines()
    assert lines[0].split()[:4] == ["arm", "trained", "share", "rate"]
    assert lines[1].split()[:2] == ["base", "0"] and "4.000" in lines[1]
    assert "2.000 ± 1.414" in lines[2] and "25 %" in lines[2] and "2.0" in lines[2] and "1,234" in lines[2]
    assert "2.000 " in lines[3] and "unknown" in lines[3] and len(lines) == 5
    assert lines[4].startswith("A processor, 1 process(es), 2 thread(s); 60 s")


def test_speed_and_memory_in_the_table_are_those_of_runs_that_trained_alone():
    at_once = run("r=3", 2.0, parallel_adapters=6, speed=9000.0, total=77_000_000)
    lines = table({"runs": [at_once, run("r=3", 4.0)], "environment": ENVIRONMENT, "seconds": 60}).splitlines()
    assert "3.000 ± 1.414" in lines[2] and lines[2].split()[-3:] == ["1,234", "50.0", "2.0"]
    lines = table({"runs": [at_once], "environment": ENVIRONMENT, "seconds": 60}).splitlines()
    assert lines[2].split()[-3:] == ["unknown"] * 3 and "2.000" in lines[2]
    assert "9,000 tokens/s by 6 adapters at once" in summary(at_once) and "at once" not in summary(run("r=3", 2.0))


def test_one_of_several_runs_has_its_own_losses_and_the_speed_of_all():
    several = history(losses=[[1.0, 2.0]] * 5, evaluations=[(0, [5.0, 6.0]), (5, [0.5, 0.25])], seconds=21.0)
    found = training_results(several.member(1), [10, 20, 30, 40, 50], memory_step=3, parallel_adapters=2)
    assert found["losses"] == [2.0] * 5 and found["validation"] == 0.25 and found["seconds"] == 21.0
    assert found["curve"] == [{"step": 0, "loss": 6.0}, {"step": 5, "loss": 0.25}]
    assert found["tokens"] == 150 and found["tokens_per_s"] == pytest.approx(2 * (20 + 30 + 50) / 4)


def test_the_samples_show_what_was_asked_and_all_answers():
    shown = shown_samples({"runs": [run("full", 1.0), run("r=3", 2.0)]})
    assert shown.splitlines()[0] == "asked" and r"'bad\n'" in shown
    assert shown.index("reference") < shown.index("by full") < shown.index("by r=3")


def test_the_summary_says_what_the_task_has():
    said = summary(run("full", 1.0))
    assert "loss 1.000, BLEU 40.0, slot errors 0.250, 1,234 tokens/s" in said and "accuracy" not in said
