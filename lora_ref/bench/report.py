"""What a run shows: a line for each row as it is measured, the tables, what was left out, and the picture."""

import inspect
import io
import itertools
import shlex
import textwrap
from collections import Counter
from datetime import UTC, datetime

import torch

from ..environment import environment, load
from ..measure import quartiles
from .benchmarks import Benchmark, Job
from .schedule import LeftOut

NOT_SHOWN = ("size", "seconds")


def machine(device: torch.device, rounds: int) -> dict:
    """Where the numbers come from: the machine, versions and threads, the time, and the rounds of a case."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date_utc": now, **environment(device, load=load()), "rounds": rounds}


def machine_line(found: dict) -> str:
    """`machine` in one line."""
    libraries = ", ".join(
        f"{name} {found['libraries'][name]}" for name in ("torch", "transformers", "peft") if name in found["libraries"]
    )
    busy = "" if found["load"] is None else f", load {found['load']:.1f}"
    return (
        f"{found['device_name']} ({found['cpu_capability']}), {found['threads']} of {found['cores']} cores{busy}, "
        f"{found['platform']}, Python {found['python']}, {libraries}; {found['rounds']} rounds; {found['date_utc']}"
    )


def cell(value: dict | str | float | None) -> str:
    """A value of a row as text."""
    if isinstance(value, dict):
        return f"{value['median']:.3f} [{value['q1']:.3f}, {value['q3']:.3f}]"
    if value is None or isinstance(value, str):
        return value or "—"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if value >= 10 else f"{value:.4f}"


def _columns(row: dict) -> dict[str, str]:
    """Key → title of what is shown of a row."""
    titles = {key: key.replace("_", " ") for key in row if key not in NOT_SHOWN}
    if "ratio" in titles:
        titles["ratio"] = "ratio [quartiles]"
    return titles


def _width(title: str, value: dict | str | float | None) -> int:
    """The width of a column of lines, from its title and its first value."""
    if isinstance(value, dict):
        return max(len(title), len("0.000 [0.000, 0.000]"))
    if isinstance(value, int):
        return max(len(title), 6 if value < 100_000 else 13)
    return max(len(title), 8)


class RowPrinter:
    """Prints each row as a line as soon as it is measured. The columns of a benchmark have the same widths in all
    lines; its name and the titles come again where the line before was another benchmark's."""

    def __init__(self, write=print):
        self.write = write
        self.widths: dict[str, dict[str, int]] = {}
        self.last = ""

    def __call__(self, job: Job, row: dict) -> None:
        titles = _columns(row)
        if job.name not in self.widths:
            self.widths[job.name] = {key: _width(title, row[key]) for key, title in titles.items()}
        widths = self.widths[job.name]
        if job.name != self.last:
            self.write(f"\n{job.name}", flush=True)
            self.write("  ".join(title.rjust(widths[key]) for key, title in titles.items()), flush=True)
            self.last = job.name
        self.write("  ".join(cell(row[key]).rjust(widths.get(key, 0)) for key in titles), flush=True)


def table(name: str, benchmark: Benchmark, rows: list[dict]) -> str:
    """The rows as text in columns, under the caption, with the summary below."""
    if not rows:
        return f"{name}: no case was measured."
    titles = _columns(rows[0])
    lines = [list(titles.values()), *([cell(row[key]) for key in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    caption = inspect.getdoc(benchmark.measure)
    return "\n".join([f"{name}: {caption}\n", *body, benchmark.summarize(rows) + "."])


def left_out_lines(
    left_out: list[LeftOut], budget: float | None, emulated: dict[torch.dtype, str], options: list[str]
) -> list[str]:
    """How many cases of each benchmark were not measured, why, and the command that measures them. `options`: those
    of this run that belong into that command."""
    lines = []
    for reason in ("interrupted", "budget", "emulated"):
        counts = Counter(one.job.name for one in left_out if one.reason == reason)
        if not counts:
            continue
        cases = ", ".join(f"{number} of {name}" for name, number in counts.items())
        if reason == "interrupted":
            lines.append(f"Incomplete: interrupted before {cases} could be measured. All cases:")
        elif reason == "budget":
            lines.append(f"Left out: {cases}; the budget of {budget:g} s did not allow for them. All cases:")
        else:
            why = "; ".join(f"{str(dtype).removeprefix('torch.')}: {text}" for dtype, text in emulated.items())
            lines.append(f"Left out: {cases}; their products are emulated here ({why}). With them:")
        more = ["--emulated"] if reason == "emulated" else []
        if reason != "emulated" and not {"--quick", "--full"} & set(options):
            more = ["--budget", "0"]
        command = ["python", "-m", "lora_ref.bench", *counts, *options, *more]
        lines.append("    " + shlex.join(command))
    return lines


def fewer_rounds_line(rows: dict[str, list[dict]], rounds: int) -> str:
    """Which benchmarks have rows of fewer rounds than asked for; empty where none has."""
    counts = {name: sum(row.get("rounds", rounds) < rounds for row in own) for name, own in rows.items()}
    cases = ", ".join(f"{number} of {name}" for name, number in counts.items() if number)
    return f"Fewer than {rounds} rounds, to stay within the budget: {cases} (column rounds)." if cases else ""


def draw_times(axes, rows: list[dict]) -> None:
    """The median time of every contender against the size, both logarithmic, bars = quartiles."""
    labels = dict.fromkeys(label for row in rows for label in row["seconds"])
    for label, style in zip(labels, itertools.cycle(("o-", "s--", "^:", "D-."))):
        points = [(row["size"], quartiles(row["seconds"][label])) for row in rows if label in row["seconds"]]
        sizes = [size for size, _ in points]
        medians = [1e3 * own["median"] for _, own in points]
        bars = [[1e3 * abs(own[end] - own["median"]) for _, own in points] for end in ("q1", "q3")]
        axes.errorbar(sizes, medians, yerr=bars, fmt=style, capsize=3, label=label)
    axes.set(xscale="log", yscale="log", ylabel="one call, ms (bars: quartiles)")


def picture(benchmarks: dict[str, Benchmark], results: dict[str, list[dict]]) -> bytes:
    """A PNG: a panel for each benchmark that has rows, with its summary as the title."""
    from matplotlib.figure import Figure

    measured = {name: rows for name, rows in results.items() if rows}
    figure = Figure(figsize=(7.2 * len(measured), 4.6), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured.items(), strict=True):
        benchmark = benchmarks[name]
        (benchmark.draw or draw_times)(axes, rows)
        if benchmark.xlabel:
            axes.set_xlabel(benchmark.xlabel)
        axes.set_title(textwrap.fill(benchmark.summarize(rows), 76), fontsize="medium")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
