"""config.py: PEFT's names and defaults, the scale against peft's layers, and what is refused."""

import ast
import dataclasses
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import lora_ref
from lora_ref.config import INITIALIZERS, LoRAConfig, scale

PACKAGE = Path(lora_ref.__file__).parent
MODULES = sorted(Path(lora_ref.__file__).parent.rglob("*.py"))
FIELDS = [field.name for field in dataclasses.fields(LoRAConfig)]


# the fields are PEFT's


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_pefts_name_and_default(name):
    assert getattr(LoRAConfig(), name) == getattr(LoraConfig(), name)


def test_the_fields_are_those_of_the_design():
    assert set(FIELDS) == set(
        "r lora_alpha target_modules exclude_modules lora_dropout use_rslora use_dora init_lora_weights rank_pattern "
        "alpha_pattern fan_in_fan_out bias modules_to_save".split()
    )


def test_one_set_of_values_is_a_config_for_both():
    values = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["lm_head"],
        "lora_dropout": 0.1,
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 9},
        "bias": "lora_only",
        "modules_to_save": ["score"],
    }
    own, theirs = LoRAConfig(**values), LoraConfig(**values)
    for name in values:
        other = getattr(theirs, name)
        assert getattr(own, name) == (sorted(other) if isinstance(other, set) else other), name


def test_a_config_is_a_value():
    config = LoRAConfig(r=3, lora_alpha=5)
    assert config == LoRAConfig(r=3, lora_alpha=5) != LoRAConfig(r=3, lora_alpha=6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4
    assert LoRAConfig().rank_pattern is not LoRAConfig().rank_pattern
    assert LoRAConfig(**dataclasses.asdict(config)) == config


# the scale


@given(st.integers(1, 300), st.floats(1e-3, 1e4) | st.integers(1, 10**4), st.booleans())
def test_the_scale_is_alpha_over_r_or_over_its_root(r, lora_alpha, use_rslora):
    config = LoRAConfig(r=r, lora_alpha=lora_alpha, use_rslora=use_rslora)
    exact = Fraction(lora_alpha) / r
    found = Fraction(config.scale) if not use_rslora else Fraction(config.scale) ** 2 * r / Fraction(lora_alpha)
    assert abs(found - (Fraction(lora_alpha) if use_rslora else exact)) <= Fraction(1, 10**14) * Fraction(lora_alpha)
    assert config.scale == scale(lora_alpha, r, use_rslora) == config.scale_of()


@given(st.integers(1, 6), st.floats(0.1, 100), st.booleans(), st.integers(1, 6), st.floats(0.1, 100))
def test_the_scale_is_that_of_pefts_layers_patterns_included(r, alpha, use_rslora, other_r, other_alpha):
    values = {"r": r, "lora_alpha": alpha, "use_rslora": use_rslora}
    patterns = {"rank_pattern": {"1": other_r}, "alpha_pattern": {"1": other_alpha}}
    model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 7))
    layers = inject_adapter_in_model(LoraConfig(target_modules=["0", "1"], **values, **patterns), model)
    config = LoRAConfig(**values, **patterns)
    assert config.scale == layers[0].scaling["default"]
    assert config.scale_of(other_r, other_alpha) == layers[1].scaling["default"]  # pitfall 7: peft#2733, rsLoRA kept
    assert config.scale_of(lora_alpha=other_alpha) == scale(other_alpha, r, use_rslora)
    assert config.scale_of(r=other_r) == scale(alpha, other_r, use_rslora)


def test_the_scale_by_hand():
    assert LoRAConfig(r=4, lora_alpha=6).scale == 1.5
    assert LoRAConfig(r=4, lora_alpha=6, use_rslora=True).scale == 3
    assert LoRAConfig().scale == 1 and LoRAConfig(lora_alpha=2).scale == 0.25
    assert LoRAConfig(r=9, lora_alpha=6).scale_of(r=4) == scale(6, 4) == 1.5


@pytest.mark.parametrize("alpha", [3, 3.0, np.float64(3), np.float32(3), np.int64(3), Fraction(3)], ids=repr)
def test_the_scale_is_a_float_whatever_alpha_is(alpha):
    found = LoRAConfig(r=4, lora_alpha=alpha).scale
    assert type(found) is float and found == 0.75
    assert type(LoRAConfig(r=4, lora_alpha=alpha, use_rslora=True).scale) is float


def divisions_of_alpha(source):
    """Every line that divides something made from a name with 'alpha' in it, or raises to a negative power."""

    def speaks_of(node, word):
        names = (getattr(part, "id", None) or getattr(part, "attr", None) or "" for part in ast.walk(node))
        return any(word in name for name in names)

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and speaks_of(node, "alpha"):
            negative = isinstance(node.op, ast.Pow) or any(
                isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow) for part in ast.walk(node)
            )
            if (isinstance(node.op, ast.Div) and speaks_of(node.left, "alpha")) or negative:
                found.append(ast.unparse(node))
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div) and speaks_of(node.target, "alpha"):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_the_scale_is_computed_in_config_and_nowhere_else(module):
    found = divisions_of_alpha(module.read_text(encoding="utf-8"))
    assert bool(found) == (module == PACKAGE / "config.py"), found


@pytest.mark.parametrize(
    "line",
    [
        "s = lora_alpha / r",
        "s = config.lora_alpha / math.sqrt(config.r)",
        "s = float(self.lora_alpha) / self.r",
        "s = alpha * r ** -0.5",
        "s = alpha * r ** -1",
        "alpha /= r",
        "s = (2 * alpha) / rank",
    ],
)
def test_a_scale_computed_elsewhere_would_be_seen(line):
    assert divisions_of_alpha(line)
    assert not divisions_of_alpha("s = config.scale / 2\nY.addmm_(H, M, alpha=s / 2)\ny = x / r")


# what is refused

BAD = [
    ("r", 0, ["r = 0", "at least 1"]),
    ("r", -3, ["r = -3"]),
    ("r", 2.0, ["r must be an integer", "2.0"]),
    ("r", True, ["r must be an integer", "True"]),
    ("r", "8", ["r must be an integer", "'8'"]),
    ("r", None, ["r must be an integer", "None"]),
    ("lora_alpha", 0, ["lora_alpha = 0", "above 0"]),
    ("lora_alpha", -1.5, ["lora_alpha = -1.5", "above 0"]),
    ("lora_alpha", math.nan, ["lora_alpha = nan"]),
    ("lora_alpha", math.inf, ["lora_alpha = inf"]),
    ("lora_alpha", "16", ["lora_alpha must be a number", "'16'"]),
    ("lora_alpha", True, ["lora_alpha must be a number", "True"]),
    ("lora_alpha", None, ["lora_alpha must be a number", "None"]),
    ("lora_dropout", 1.0, ["lora_dropout = 1.0", "0 <= lora_dropout < 1"]),
    ("lora_dropout", -0.1, ["lora_dropout = -0.1"]),
    ("lora_dropout", math.nan, ["lora_dropout = nan"]),
    ("lora_dropout", "0.1", ["lora_dropout must be a number", "'0.1'", "0 <= lora_dropout < 1"]),
    ("lora_dropout", True, ["lora_dropout must be a number", "True", "0 <= lora_dropout < 1"]),
    ("lora_dropout", False, ["lora_dropout must be a number", "False", "0 <= lora_dropout < 1"]),
    ("lora_dropout", None, ["lora_dropout must be a number", "None", "0 <= lora_dropout < 1"]),
    ("use_rslora", 1, ["use_rslora must be True or False", "1"]),
    ("use_dora", "no", ["use_dora must be True or False", "'no'"]),
    ("fan_in_fan_out", None, ["fan_in_fan_out must be True or False", "None"]),
    ("use_dora", True, ["use_dora = True", "not implemented"]),
    ("init_lora_weights", "olora", ["init_lora_weights = 'olora'", "pissa"]),
    ("init_lora_weights", 1, ["init_lora_weights = 1", "kaiming"]),
    ("init_lora_weights", None, ["init_lora_weights = None"]),
    ("init_lora_weights", [], ["init_lora_weights = []"]),
    ("bias", "lora", ["bias = 'lora'", "'lora_only'"]),
    ("bias", False, ["bias = False"]),
    ("target_modules", 5, ["target_modules", "got 5"]),
    ("target_modules", ["q", 1], ["target_modules", "['q', 1]", "or one string"]),
    ("target_modules", {"q": 1}, ["target_modules", "{'q': 1}"]),
    ("exclude_modules", [None], ["exclude_modules", "[None]"]),
    ("modules_to_save", "score", ["modules_to_save must be a list of names, got 'score'"]),
    ("modules_to_save", [b"score"], ["modules_to_save", "[b'score']"]),
    ("rank_pattern", ["q"], ["rank_pattern must be a dict", "['q']"]),
    ("rank_pattern", None, ["rank_pattern must be a dict", "None"]),
    ("rank_pattern", {1: 4}, ["rank_pattern must be a dict", "{1: 4}"]),
    ("rank_pattern", {"q": 4, "v": 0}, ["rank_pattern['v']", "r = 0"]),
    ("rank_pattern", {"v": 2.5}, ["rank_pattern['v']", "2.5"]),
    ("rank_pattern", {"v": None}, ["rank_pattern['v']", "None"]),
    ("alpha_pattern", [("q", 1)], ["alpha_pattern must be a dict", "[('q', 1)]"]),
    ("alpha_pattern", {"v": 0}, ["alpha_pattern['v']", "lora_alpha = 0"]),
    ("alpha_pattern", {"v": "2"}, ["alpha_pattern['v']", "'2'"]),
    ("alpha_pattern", {"v": None}, ["alpha_pattern['v']", "None"]),
]


@pytest.mark.parametrize("name, value, says", BAD, ids=[f"{name}={value!r}" for name, value, _ in BAD])
def test_a_bad_value_is_refused_with_its_field_and_a_fix(name, value, says, refused):
    refused(lambda: LoRAConfig(**{name: value}), *says)
    if name in ("r", "lora_alpha"):
        refused(lambda: scale(**({"r": 3, "lora_alpha": 5} | {name: value})), *says)
        if value is not None:  # None is "this config's own"
            refused(lambda: LoRAConfig().scale_of(**{name: value}), *says)


def test_every_field_is_checked():
    assert {name for name, _, _ in BAD} == set(FIELDS)


@pytest.mark.parametrize(
    "values",
    [
        {"r": np.int64(3), "lora_alpha": 5},
        {"lora_dropout": 0},
        {"lora_dropout": 0.999},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ("q_proj",), "exclude_modules": {"lm_head"}},
        {"target_modules": [], "modules_to_save": []},
        {"rank_pattern": {"^model.*q": np.int64(3)}, "alpha_pattern": {"v": 0.5}},
        *({"bias": bias} for bias in ("none", "all", "lora_only")),
        *({"init_lora_weights": name} for name in (True, False, *INITIALIZERS)),
    ],
    ids=repr,
)
def test_what_is_allowed(values):
    config = LoRAConfig(**values)
    assert all(getattr(config, name) == value for name, value in values.items())


def test_the_start_is_named_as_in_pefts_docs():
    assert LoRAConfig().init_name == LoRAConfig(init_lora_weights="kaiming").init_name == "kaiming"
    assert LoRAConfig(init_lora_weights=False).init_name == "random"
    assert [LoRAConfig(init_lora_weights=name).init_name for name in INITIALIZERS] == list(INITIALIZERS)
