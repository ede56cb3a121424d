"""The ledger refuses what is malformed, and a claim prints one fixed line or fails with its evidence."""

import ast
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_ref.course import claims
from lora_ref.course.claims import Claim, ClaimError, LedgerError, UnknownClaim, WrongLesson

ENTRY = {
    "statement": "LoRA | is slow.",
    "verdict": "false",
    "finding": "It is faster.",
    "source": "measured here",
    "lesson": "03_lora_layer",
}
OTHER = ENTRY | {"statement": "LoRA is low-rank.", "verdict": "true", "lesson": "01_svd_truncation"}


def toml(id="lora_is_slow", **entry):
    """A ledger's table; a string value is written as TOML text, anything else through repr."""
    values = {key: f'"""{value}"""' if isinstance(value, str) else repr(value) for key, value in entry.items()}
    return "\n".join([f"[{id}]", *(f"{key} = {value}" for key, value in values.items()), ""])


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "claims.toml"
        path.write_text(text, encoding="utf-8")
        return claims.load(path)

    return load


@pytest.fixture
def small_ledger(load, tmp_path, monkeypatch):
    load(toml(**ENTRY) + toml("lora_is_low_rank", **OTHER))
    monkeypatch.setattr(claims, "LEDGER", tmp_path / "claims.toml")


# The ledger


def test_real_ledger_loads():
    ledger = claims.ledger()
    assert ledger and all(isinstance(claim, Claim) and claim.id == id for id, claim in ledger.items())
    assert ledger["lora_parameter_count"].refs == ("A4",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ledger["lora_parameter_count"].verdict = "false"


def test_load_joins_lines_and_keeps_order(load):
    ledger = load(toml("z", **ENTRY | {"finding": "Two\n    lines."}, refs=["A4", "C12"]) + toml("a", **ENTRY))
    assert list(ledger) == ["z", "a"]
    assert ledger["z"].finding == "Two lines." and ledger["z"].refs == ("A4", "C12") and ledger["a"].refs == ()


@pytest.mark.parametrize("verdict", claims.VERDICTS)
def test_load_accepts_every_verdict(load, verdict):
    assert load(toml(**ENTRY | {"verdict": verdict}))["lora_is_slow"].verdict == verdict


@pytest.mark.parametrize(
    "text, message",
    [
        (toml(**ENTRY, found="x"), r"\[lora_is_slow\] has the unknown key 'found'; the keys are statement, "),
        *[(toml(**{k: v for k, v in ENTRY.items() if k != key}), f"lacks the key '{key}'") for key in ENTRY],
        *[(toml(**ENTRY | {key: " "}), f"{key} = ' ' says nothing; write a non-empty text") for key in ENTRY],
        (toml(**ENTRY | {"source": 3}), "source = 3 says nothing"),
        (toml(**ENTRY | {"verdict": "maybe"}), "verdict = 'maybe' is unknown; choose one of true, conditional, false"),
        (toml(**ENTRY | {"lesson": "lora"}), "lesson = 'lora' is no lesson's name; .* such as 01_svd_truncation"),
        (toml(**ENTRY | {"lesson": "03_lora_layer.ipynb"}), "is no lesson's name"),
        (toml(**ENTRY, refs="A4"), "refs = 'A4' is no list of reference ids; write it as"),
        (toml(**ENTRY, refs=["A4", 4]), "is no list of reference ids"),
        (toml("A4", **ENTRY), r"\[A4\] is no claim id; use small letters"),
        (toml("claims.a4", **ENTRY), r"\[claims\] has the unknown key 'a4'"),
        ("lora_is_slow = 1", r"\[lora_is_slow\] = 1 is no table; write \[lora_is_slow\] above the keys"),
        (toml(**ENTRY) * 2, "claims.toml is not valid TOML: Cannot declare .*lora_is_slow"),
        ("[lora", "claims.toml is not valid TOML"),
    ],
)
def test_load_refuses_malformed(load, text, message):
    with pytest.raises(LedgerError, match=message):
        load(text)


def test_load_lists_every_fault(load):
    with pytest.raises(LedgerError) as error:
        load(toml("a", **ENTRY | {"verdict": "no"}) + toml("b", **ENTRY | {"source": ""}, more="x"))
    assert "(3 faults)" in str(error.value) and len(str(error.value).splitlines()) == 4


# claim


def test_claim_prints_fixed_lines(small_ledger, capsys):
    lines = "✓ lora_is_slow\n  people say: “LoRA | is slow.”\n  FALSE. Found: It is faster.\n"
    for evidence in ({}, {"ratio": 0.61}, {"ratio": torch.tensor(0.62), "id": 3, "holds": 4}):
        assert claims.claim("lora_is_slow", True, **evidence) is None
        assert capsys.readouterr().out == lines
    assert claims.ledger()["lora_is_slow"].text + "\n" == lines


@pytest.mark.parametrize("make", [bool, np.bool_, np.array, torch.tensor])
def test_claim_takes_one_truth_value(small_ledger, capsys, make):
    claims.claim("lora_is_slow", make(True))
    with pytest.raises(ClaimError):
        claims.claim("lora_is_slow", make(False))
    assert capsys.readouterr().out.count("✓") == 1


@pytest.mark.parametrize(
    "holds, message",
    [
        (1, "got 1; write a comparison, such as error < 1e-6"),
        ("yes", "got 'yes'; write a comparison"),
        (None, "got None; write a comparison"),
        ([True], r"got \[True\]; write a comparison"),
        (torch.tensor(1.0), r"got Tensor of dtype torch.float32 and shape \(\); write a comparison"),
        (torch.tensor([True, True]), r"got Tensor of dtype torch.bool and shape \(2,\); reduce it with .all\(\)"),
        (torch.tensor([True]), r"got Tensor of dtype torch.bool and shape \(1,\); reduce it with .all\(\) or .any\(\)"),
        (np.array([True, False]), r"got ndarray of dtype bool and shape \(2,\); reduce it with .all\(\)"),
        (np.float64(1.0), r"got float64 of dtype float64 and shape \(\); write a comparison"),
    ],
)
def test_claim_refuses_anything_else(small_ledger, capsys, holds, message):
    with pytest.raises(TypeError, match=f"claim 'lora_is_slow': holds must be one truth value, {message}"):
        claims.claim("lora_is_slow", holds)
    assert capsys.readouterr().out == ""


def test_false_claim_shows_statement_verdict_finding_and_evidence(small_ledger, capsys):
    with pytest.raises(ClaimError) as error:
        claims.claim("lora_is_slow", False, ratio=torch.tensor(1.23, dtype=torch.float64), rank=8, rates=[0.1] * 200)
    message = str(error.value)
    for words in ("lora_is_slow", "LoRA | is slow.", "false", "It is faster.", "ratio = 1.23, rank = 8, rates = [0.1,"):
        assert words in message
    assert len(message) < 500 and isinstance(error.value, AssertionError) and capsys.readouterr().out == ""


def test_false_claim_without_evidence_asks_for_it(small_ledger):
    with pytest.raises(ClaimError, match=r"none; pass it as claim\(id, holds, name=value\)"):
        claims.claim("lora_is_slow", False)


def test_unknown_id_names_near_ones_and_where_to_add_it(small_ledger):
    with pytest.raises(
        UnknownClaim, match=r"no claim 'lora_is_slwo'.* mean 'lora_is_slow'.* add a table \[lora_is_slwo"
    ):
        claims.claim("lora_is_slwo", True)
    with pytest.raises(LookupError) as error:
        claims.claim("quantum", True)
    assert "did you mean" not in str(error.value) and "lora_ref/course/claims.toml" in str(error.value)


def test_swapped_arguments_are_named(small_ledger):
    with pytest.raises(TypeError, match=r'id must be a string, got True; write claim\("id", holds, …\)'):
        claims.claim(True, "lora_is_slow")


# Lessons


def test_open_lesson_binds_the_lesson(small_ledger, capsys):
    claim = claims.open_lesson("03_lora_layer")
    claim("lora_is_slow", True, lesson="evidence may have any name")
    assert capsys.readouterr().out == claims.ledger()["lora_is_slow"].text + "\n"
    with pytest.raises(WrongLesson, match="'lora_is_low_rank' in lesson '01_svd_truncation', .* is '03_lora_layer'"):
        claim("lora_is_low_rank", True)
    with pytest.raises(ClaimError):
        claim("lora_is_slow", False)
    claims.claim("lora_is_low_rank", True)


@pytest.mark.parametrize("ask", [claims.open_lesson, claims.lesson_claims, claims.claims_table])
def test_unknown_lesson_names_the_known(small_ledger, ask):
    with pytest.raises(WrongLesson, match="no lesson '13_more'; it knows 01_svd_truncation, 03_lora_layer"):
        ask("13_more")


def test_lesson_claims_and_table(small_ledger):
    (claim,) = claims.lesson_claims("03_lora_layer")
    assert claim.id == "lora_is_slow"
    head, rule, row = claims.claims_table("03_lora_layer").splitlines()
    assert row == r"| `lora_is_slow` | LoRA \| is slow. | **false** | It is faster. | measured here |"
    assert head.count("|") == rule.count("|") == 6


def test_module_imports_the_standard_library_only():
    nodes = ast.walk(ast.parse(Path(claims.__file__).read_text(encoding="utf-8")))
    names = [getattr(node, "module", None) or node.names[0].name for node in nodes if hasattr(node, "names")]
    assert "tomllib" in names and {name.split(".")[0] for name in names} <= sys.stdlib_module_names
