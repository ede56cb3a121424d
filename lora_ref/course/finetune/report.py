"""Runs in numbers, for the record, and in words, for people: a line for a run, a table of the arms, samples."""

import statistics

from ...measure import quartiles
from ..training import History


def training_results(history: History, tokens: list[int], memory_step: int | None, parallel_adapters: int = 1) -> dict:
    """The record's account of one run's training; of several at once, speed, memory and seconds are those of all."""
    return speed(history, tokens, memory_step, parallel_adapters) | {
        "peak_bytes": peak(history),
        "losses": history.losses,
        "curve": [{"step": step, "loss": loss} for step, loss in history.evaluations],
        "validation": history.evaluations[-1][1],
        "seconds": history.seconds,
    }


def speed(history: History, tokens: list[int], memory_step: int | None, parallel_adapters: int = 1) -> dict:
    """The record's tokens (one run's), tokens_per_s, step_ms; the first step and the measured one are no fair ones."""
    fair = [t for t in range(len(tokens)) if t not in (0, memory_step)] or list(range(len(tokens)))
    seconds = [history.step_seconds[t] for t in fair]
    return {
        "tokens": sum(tokens),
        "tokens_per_s": parallel_adapters * sum(tokens[t] for t in fair) / sum(seconds),
        "step_ms": {name: 1e3 * value for name, value in quartiles(seconds).items()},
    }


def peak(history: History) -> dict:
    """The record's peak_bytes."""
    m = history.memory
    parts = ("weights", "gradients", "optimizer")
    if m is None:
        return dict.fromkeys(("total", *parts, "activations"))
    rest = m["peak"] - sum(m[part] for part in parts)
    return {"total": m["peak"]} | {part: m[part] for part in parts} | {"activations": rest}


def summary(run: dict) -> str:
    """What came out, in a line."""
    others = "" if run["parallel_adapters"] == 1 else f" by {run['parallel_adapters']} adapters at once"
    names = {"loss": "loss {:.3f}", "bleu": "BLEU {:.1f}", "slot_errors": "slot errors {:.3f}"}
    names |= {"accuracy": "accuracy {:.3f}", "f1": "F1 {:.3f}"}
    said = [form.format(run["after"][key]) for key, form in names.items() if run["after"][key] is not None]
    return ", ".join(
        [
            f"validation {run['validation']:.3f}",
            *said,
            f"{run['tokens_per_s']:,.0f} tokens/s{others}",
            f"{run['seconds']:.0f} s",
        ]
    )


def table(record: dict) -> str:
    """The arms at their best learning rates, beside the untrained base: means over seeds ± their standard deviation.

    Speed and memory are those of runs that trained alone, where there are any.

    Args:
        record: as `load_record` gives it.

    Returns:
        A table as text, and a line that says where and how long it ran.

    Example:
        >>> from lora_ref.course.finetune.records import load_record
        >>> print(table(load_record("cpu-mini")).splitlines()[0])
         arm    trained   share   rate           loss        bleu    slot errors  tokens/s  ms/step  peak MB
    """
    measures = [
        k for k in ("loss", "bleu", "slot_errors", "accuracy", "f1") if record["runs"][0]["after"][k] is not None
    ]
    head = [
        "arm",
        "trained",
        "share",
        "rate",
        *(k.replace("_", " ") for k in measures),
        "tokens/s",
        "ms/step",
        "peak MB",
    ]
    rows = [["base", "0", "0 %", "", *(_mean([record["runs"][0]["before"][k]]) for k in measures), "", "", ""]]
    for arm in dict.fromkeys(run["arm"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["arm"] == arm and run["chosen"]]
        one, alone = runs[0], [run for run in runs if run["parallel_adapters"] == 1]
        peaks = [run["peak_bytes"]["total"] for run in alone] or [None]
        speeds = [run["tokens_per_s"] for run in alone], [run["step_ms"]["median"] for run in alone]
        share = 100 * one["parameters_trained"] / one["parameters"]
        rows.append(
            [arm, f"{one['parameters_trained']:,}", f"{share:.3g} %", f"{one['lr']:.2g}"]
            + [_mean([run["after"][k] for run in runs]) for k in measures]
            + [f"{statistics.mean(v):,.{digits}f}" if v else "unknown" for v, digits in zip(speeds, (0, 1))]
            + ["unknown" if None in peaks else f"{max(peaks) / 1e6:,.1f}"]
        )
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [head, *rows]]
    environment = record["environment"]
    where = f"{environment['device_name']}, {environment['processes']} process(es), {environment['threads']} thread(s)"
    return "\n".join([*lines, f"{where}; {record['seconds']:.0f} s in all"])


def _mean(values: list[float]) -> str:
    mean = statistics.mean(values)
    digits = 1 if abs(mean) >= 10 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def shown_samples(record: dict, n: int = 2) -> str:
    """The first samples: the input, the reference, the base's answer, each arm's.

    Args:
        record: as `load_record` gives it.
        n: how many.

    Returns:
        The samples as text.

    Example:
        >>> from lora_ref.course.finetune.records import load_record
        >>> [line.split()[0] for line in shown_samples(load_record("cpu-mini"), 1).splitlines()[1:]]
        ['reference', 'base', 'full', 'r=8']
    """
    chosen = {run["arm"]: run for run in reversed(record["runs"]) if run["chosen"]}
    first = next(iter(chosen.values()))["samples"][:n]
    lines = []
    for i, sample in enumerate(first):
        lines += [
            sample["input"],
            f"  {'reference':<10}{sample['reference']}",
            f"  {'base':<10}{sample['before']!r:.150}",
        ]
        lines += [f"  {arm:<10}{run['samples'][i]['after']}" for arm, run in reversed(chosen.items())]
    return "\n".join(lines)
