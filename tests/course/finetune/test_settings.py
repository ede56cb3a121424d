"""course/finetune/settings.py: one flat name for each setting, read from the one declaration."""

import pytest

from lora_ref.course.finetune.config import Profile
from lora_ref.course.finetune.profiles import PROFILES, profile
from lora_ref.course.finetune.settings import RENAMED, SETTINGS, flatten, nest, override, to_profile


def declared():
    """(group, field, FieldInfo) of every setting."""
    for group, info in Profile.model_fields.items():
        for field, inner in info.annotation.model_fields.items():
            yield group, field, inner


def test_every_declared_field_is_a_setting_under_one_name():
    assert len(SETTINGS) == len(list(declared()))
    assert {(s.group, s.field) for s in SETTINGS.values()} == {(group, field) for group, field, _ in declared()}
    assert SETTINGS["model"].group == "base" and SETTINGS["base_steps"].field == "steps"
    assert SETTINGS["steps"].group == "optimisation"


def test_a_setting_has_the_declarations_description_default_range_unit_and_choices():
    for group, field, info in declared():
        [own] = [s for s in SETTINGS.values() if (s.group, s.field) == (group, field)]
        assert own.description == info.description and own.default == info.default and len(own.description) > 4
        assert own.kind in (int, float, bool, str) and isinstance(own.default, tuple) == own.is_list
        assert own.kind is not int or own.low is not None, f"{own.name} has no lowest value"
    assert SETTINGS["steps"].range == "at least 2 steps" and SETTINGS["full_lrs"].range == "between 1e-09 and 10"
    assert SETTINGS["device"].choices == ("auto", "cpu", "cuda") and SETTINGS["model"].range == ""


@pytest.mark.parametrize("name", PROFILES)
def test_flat_and_nested_are_the_same_settings(name):
    nested = PROFILES[name].model_dump()
    assert nest(flatten(nested)) == nested and set(flatten(nested)) == set(SETTINGS)
    assert profile("cpu-mini", **flatten(nested)) == PROFILES[name] == to_profile(nested)


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_old_names_are_refused_with_the_new_one(old, new, refused):
    assert new in SETTINGS and old not in SETTINGS
    refused(lambda: profile("cpu-mini", **{old: 3}), f"{old} is called {new} now")


def test_each_setting_refuses_what_is_just_outside_its_range(refused):
    for own in SETTINGS.values():
        for bound, step in ((own.low, -1), (own.high, 1)):
            if bound is not None:
                value = own.kind(bound + step)
                value = (value,) if own.is_list else value
                refused(lambda: override(Profile(), **{own.name: value}), f"{own.name} = ", own.range)  # noqa: B023


def test_groups_that_are_none_are_refused_with_near_matches(refused):
    refused(lambda: to_profile({"optimisation": 3}), "optimisation must be a map of settings", "3")
    refused(lambda: to_profile({"adaptor": {}}), "no field 'adaptor'", "'adapter'")
    refused(lambda: to_profile({"adapter": {"lora_alfa": 3}}), "adapter has no field 'lora_alfa'", "'lora_alpha'")
    refused(lambda: to_profile([]), "a profile must be a map of settings")
