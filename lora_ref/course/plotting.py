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

    It sets matplotlib's rcParams to STYLE, for this figure and the later ones.

    Args:
        finding: the title, one sentence.
        rows: how many rows of axes.
        columns: how many columns of axes.
        **options: go to plt.subplots (figsize in inches, sharey …).

    Returns:
        The figure and its axes: one Axes, or an array of them for more than one row or column.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> made, axes = figure("Rank 2 is enough", columns=3, figsize=(9, 3))
        >>> made.get_suptitle(), axes.shape
        ('Rank 2 is enough', (3,))
        >>> plt.close(made)
    """
    plt.rcParams.update(STYLE)
    made, axes = plt.subplots(rows, columns, **options)
    made.suptitle(finding, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
    return made, axes


def seeds(ax: Axes, x, runs, label: str, series: int = 0) -> None:
    """Draw the mean over seeds as a line, and the range from the worst to the best seed as a band.

    Args:
        ax: the axes to draw on.
        x: n numbers.
        runs: shape (seeds, n), one row for each seed.
        label: the line's name in the legend.
        series: which entry of SERIES gives colour, marker and line; counted modulo their number.

    Raises:
        ValueError: runs does not have one column for each x and at least two rows.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> made, ax = figure("The loss falls")
        >>> seeds(ax, [1, 2, 3], [[4.0, 2.0, 1.0], [6.0, 3.0, 2.0]], "LoRA")
        >>> ax.lines[0].get_ydata().tolist()
        [5.0, 2.5, 1.5]
        >>> plt.close(made)
    """
    runs = np.asarray(runs, dtype=float)
    if runs.ndim != 2 or runs.shape[1] != len(x) or len(runs) < 2:
        raise ValueError(f"runs has shape {runs.shape}; pass (seeds, {len(x)}) with at least two seeds")
    look = SERIES[series % len(SERIES)]
    ax.plot(x, runs.mean(0), label=label, **look)
    ax.fill_between(x, runs.min(0), runs.max(0), color=look["color"], alpha=0.15, linewidth=0)


def log_ticks(ax: Axes, values) -> None:
    """Give axes a logarithmic x axis with a tick at each of these values, and nowhere else.

    Args:
        ax: the axes to change.
        values: the ticks, numbers above 0; their labels have commas between thousands.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> made, ax = figure("More steps help")
        >>> log_ticks(ax, [10, 1000])
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['10', '1,000']
        >>> plt.close(made)
    """
    ax.set_xscale("log")
    ax.set_xticks(list(values), [f"{v:,}" for v in values])
    ax.minorticks_off()


def spread(runs, digits: int = 3) -> str:
    """'mean ± sample standard deviation' as text.

    Args:
        runs: one number for each seed, at least two.
        digits: how many decimals.

    Returns:
        The text; the standard deviation divides by the number of seeds less one.

    Raises:
        ValueError: fewer than two numbers, which have no spread, or more than one axis.

    Example:
        >>> spread([0.5, 0.7, 0.9], digits=2)
        '0.70 ± 0.20'
    """
    runs = np.asarray(runs, dtype=float)
    if runs.ndim != 1 or len(runs) < 2:
        raise ValueError(f"{runs.size} number(s) of shape {runs.shape} have no spread; pass one for each of the seeds")
    return f"{runs.mean():.{digits}f} ± {runs.std(ddof=1):.{digits}f}"
