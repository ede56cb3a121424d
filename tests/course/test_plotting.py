"""The palette can be told apart by everybody and in grey; the helpers show the spread or refuse."""

from itertools import combinations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lora_ref.course.plotting import COLOURS, SERIES, figure, log_ticks, seeds, spread

# How colours appear with each kind of colour blindness: linear RGB → linear RGB (Machado et al. 2009, severity 1).
SIGHT = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, sight="full"):
    """CIE L*a*b* of a colour as seen with this sight: L* from 0 (black) to 100 (white)."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    x, y, z = np.cbrt(XYZ @ seen / XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture
def axes():
    fig, ax = figure("a finding")
    yield ax
    plt.close(fig)


@pytest.mark.parametrize("sight", SIGHT)
def test_all_series_colours_are_told_apart_with_every_kind_of_sight(sight):
    for one, other in combinations(SERIES, 2):
        assert np.linalg.norm(lab(one["color"], sight) - lab(other["color"], sight)) > 15, (one, other)


def test_neighbouring_series_differ_in_grey_and_none_is_as_light_as_paper():
    light = [lab(series["color"])[0] for series in SERIES]
    assert min(abs(np.diff(light[:4]))) > 15 and max(light) < 75


def test_no_two_series_share_a_marker_or_a_line():
    assert len({s["marker"] for s in SERIES}) == len({str(s["linestyle"]) for s in SERIES}) == len(SERIES)
    assert {s["color"] for s in SERIES} <= set(COLOURS.values())


def test_a_figure_says_its_finding_and_keeps_the_style(axes):
    assert axes.figure.get_suptitle() == "a finding"
    assert not axes.spines["top"].get_visible() and axes.xaxis.get_gridlines()[0].get_visible()


def test_seeds_draws_the_mean_and_the_whole_range(axes):
    runs = np.array([[1.0, 5.0, 2.0], [3.0, 4.0, 8.0], [2.0, 9.0, 5.0]])
    seeds(axes, [1, 2, 4], runs, "three seeds")
    (line,), (band,) = axes.get_lines(), axes.collections
    assert line.get_ydata().tolist() == [2.0, 6.0, 5.0] and line.get_label() == "three seeds"
    corners = band.get_paths()[0].vertices
    for x, low, high in ((1, 1, 3), (2, 4, 9), (4, 2, 8)):
        at = corners[corners[:, 0] == x, 1]
        assert (at.min(), at.max()) == (low, high)


@pytest.mark.parametrize("runs", [[1.0, 2.0, 3.0], [[1.0, 2.0, 3.0]], [[1.0, 2.0], [3.0, 4.0]]])
def test_seeds_refuses_one_seed_or_another_length(axes, runs):
    with pytest.raises(ValueError, match=r"runs has shape \(.*\); pass \(seeds, 3\) with at least two seeds"):
        seeds(axes, [1, 2, 4], runs, "too few")
    assert not axes.get_lines() and not axes.collections


def test_log_ticks_stand_at_the_values_and_nowhere_else(axes):
    axes.plot([50, 4000], [0, 1])
    log_ticks(axes, [50, 400, 4000])
    assert axes.get_xscale() == "log" and not len(axes.get_xticks(minor=True))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["50", "400", "4,000"]


def test_spread_is_the_mean_and_the_sample_standard_deviation():
    assert spread([1.0, 2.0, 6.0], 2) == "3.00 ± 2.65"
    with pytest.raises(ValueError, match="1 number"):
        spread([0.5])
