"""One palette and one figure style for every lesson; runs over seeds always with their spread.

The eight colours are those of Okabe & Ito (2008), chosen to be told apart with any of the common
forms of colour blindness. In `SERIES` they are ordered so that neighbours also differ in grey,
and each comes with its own marker and line, so that no figure needs its colours to be read.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}
SERIES = [
    {"color": COLOURS["blue"], "marker": "o", "linestyle": "-"},
    {"color": COLOURS["orange"], "marker": "s", "linestyle": "--"},
    {"color": COLOURS["black"], "marker": "^", "linestyle": "-."},
    {"color": COLOURS["purple"], "marker": "D", "linestyle": ":"},
    {"color": COLOURS["green"], "marker": "v", "linestyle": (0, (5, 1))},
]
STYLE = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 96,
    "savefig.dpi": 96,
    "figure.constrained_layout.use": True,
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "image.cmap": "gray",
}


def figure(finding: str, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, Axes]:
    """A figure whose title says what was found; its axes as plt.subplots gives them.

    `options` go to plt.subplots (figsize in inches, sharey …).
    """
    plt.rcParams.update(STYLE)
    made, axes = plt.subplots(rows, columns, **options)
    made.suptitle(finding, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
    return made, axes


def seeds(ax: Axes, x, runs, label: str, series: int = 0) -> None:
    """The mean over seeds as a line, the range from the worst to the best seed as a band.

    x: n numbers; runs: (seeds, n), one row for each seed; series: which entry of SERIES.
    Errors: ValueError unless runs has one column for each x and at least two rows.
    """
    runs = np.asarray(runs, dtype=float)
    if runs.ndim != 2 or runs.shape[1] != len(x) or len(runs) < 2:
        raise ValueError(f"runs has shape {runs.shape}; pass (seeds, {len(x)}) with at least two seeds")
    look = SERIES[series % len(SERIES)]
    ax.plot(x, runs.mean(0), label=label, **look)
    ax.fill_between(x, runs.min(0), runs.max(0), color=look["color"], alpha=0.15, linewidth=0)


def log_ticks(ax: Axes, values) -> None:
    """A logarithmic x axis with a tick at each of these values, and nowhere else."""
    ax.set_xscale("log")
    ax.set_xticks(list(values), [f"{v:,}" for v in values])
    ax.minorticks_off()


def spread(runs, digits: int = 3) -> str:
    """'mean ± sample standard deviation' as text; runs holds one number for each seed.

    Errors: ValueError for fewer than two numbers, which have no spread.
    """
    runs = np.asarray(runs, dtype=float)
    if runs.ndim != 1 or len(runs) < 2:
        raise ValueError(f"{runs.size} number(s) of shape {runs.shape} have no spread; pass one for each of the seeds")
    return f"{runs.mean():.{digits}f} ± {runs.std(ddof=1):.{digits}f}"
