"""_checks.py: what is accepted comes back unchanged; what is not is refused with its name, its value and the fix."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lora_ref._checks import (
    check_bool,
    check_choice,
    check_finite,
    check_fraction,
    check_integer,
    check_positive,
    check_probability,
    check_rank,
    check_regex,
    did_you_mean,
)

NO_NUMBERS = ["1", None, True, False, 1j, [1], torch.tensor(0.5)]
FINITE = "choose a finite number above 0"
NUMBERS = [  # check, values that it accepts, values out of its range, words of the error
    (check_positive, [3, 0.1, Fraction(1, 4), np.float32(2), np.int64(5)], [0, -1, math.nan, math.inf], FINITE),
    (check_positive, [1e308, 5e-324], [10**400, -math.inf, 0.0], FINITE),
    (check_finite, [0, -2.5, Fraction(-1, 3)], [math.nan, math.inf, -math.inf, 10**400], "choose a finite number"),
    (check_probability, [0, 0.0, 0.999, Fraction(1, 4)], [1, 1.0, -0.1, math.nan, math.inf], "0 <= x < 1"),
    (check_fraction, [1, 0.001, Fraction(9, 10)], [0, 1.5, -0.1, math.nan, -math.inf], "0 < x <= 1"),
]


def test_a_number_in_range_comes_back_as_a_float():
    for check, good, _, _ in NUMBERS:
        for value in good:
            found = check(value, "x")
            assert type(found) is float and found == float(value), (check.__name__, value)


def test_a_number_out_of_range_is_a_value_error_with_name_value_and_fix():
    for check, _, bad, words in NUMBERS:
        for value in bad:
            with pytest.raises(ValueError) as error:
                check(value, "x")
            assert f"x = {value!r}" in str(error.value) and words in str(error.value), check.__name__


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("check", [check_positive, check_finite, check_probability, check_fraction])
def test_anything_but_a_number_is_a_type_error_with_name_value_and_kind(check, value):
    with pytest.raises(TypeError) as error:
        check(value, "x")
    for words in ("x must be a number", repr(value), type(value).__name__, "choose a"):
        assert words in str(error.value)


@pytest.mark.parametrize("check", [check_positive, check_finite])
@pytest.mark.parametrize("value", [math.nan, "1"])
def test_the_callers_own_fix_stands_in_the_message(check, value):
    with pytest.raises((TypeError, ValueError), match=r"finite number.* \(PEFT's default is 8\)"):
        check(value, "x", "PEFT's default is 8")


def test_integers_and_ranks():
    assert check_integer(np.int64(3), "n", 1) == 3 and check_rank(2, 3, 2) == 2
    for value, error in ((0, ValueError), (5, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match=f"n .*{value!r}.* between 1 and 4"):
            check_integer(value, "n", 1, 4)
    with pytest.raises(ValueError, match="r = 3 is out of range; .*between 1 and 2.*3×2 matrix has rank at most 2"):
        check_rank(3, 3, 2)


def test_bools():
    assert check_bool(True, "flag") is True and check_bool(False, "flag") is False
    for value in (0, 1, "yes", None, np.bool_(True)):
        with pytest.raises(TypeError, match="flag must be True or False, got"):
            check_bool(value, "flag")


def test_choices():
    choices = (True, False, "kaiming", "zero")
    assert [check_choice(value, "init", choices) for value in choices] == list(choices)
    assert check_choice("b", "name", {"a": 1, "b": 2}) == "b"
    assert check_choice(torch.float64, "dtype", (torch.float32, torch.float64)) is torch.float64
    for value in (1, 0, None, [], "zer", torch.ones(3), np.array(["zero"])):
        with pytest.raises(ValueError, match="init = .* is unknown; choose True, False, 'kaiming' or 'zero'$"):
            check_choice(value, "init", choices)
    with pytest.raises(ValueError, match="name = 'x' is unknown; choose 'a'; see the list$"):
        check_choice("x", "name", ["a"], "see the list")


def test_regular_expressions():
    assert check_regex(r".*\.q_proj", "target_modules").fullmatch("layers.0.q_proj")
    assert check_regex("q|v", "rank_pattern", r"(.*\.)?({})$").match("a.v")
    with pytest.raises(ValueError, match=r"target_modules = '\(q' is not a regular expression: missing \)"):
        check_regex("(q", "target_modules")
    with pytest.raises(TypeError, match="target_modules must be a regular expression, got 5 of type int"):
        check_regex(5, "target_modules")


def test_a_near_name_is_offered_and_else_the_known_ones():
    known = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    assert did_you_mean("lm_hat", known) == "did you mean 'lm_head'?"
    assert did_you_mean("p_proj", known).count("_proj'") == 3
    assert did_you_mean("zzz", known) == "there are q_proj, k_proj, v_proj, o_proj, lm_head"
    assert did_you_mean("zzz", iter(known), listed=2) == "there are q_proj, k_proj and 3 more"
    assert did_you_mean("zzz", known, listed=5) == did_you_mean("zzz", known, listed=9) == did_you_mean("zzz", known)
    assert did_you_mean("zzz", known, listed=0) == "" and did_you_mean("zzz", []) == "there are none"
    assert did_you_mean("lm_hat", known, listed=0) == "did you mean 'lm_head'?"
    assert did_you_mean("zzz", ["a", "b", "a"]) == "there are a, b"
