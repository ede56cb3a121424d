"""The ledger of claims, and `claim`, which settles one of them in a lesson.

A lesson opens with `claim = open_lesson("01_svd_truncation")`. From then on
`claim("id", holds, error=error)` prints a few fixed lines when the ledger's finding holds as measured,
and raises `ClaimError`, with the evidence, when it does not. `claims.toml` explains its own format.
"""

import difflib
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from importlib.resources import files
from pathlib import Path

LEDGER = files("lora_ref.course") / "claims.toml"
VERDICTS = ("true", "conditional", "false", "unsourced")
TEXTS = ("statement", "verdict", "finding", "source", "lesson")


class LedgerError(ValueError):
    """The ledger is malformed; the message lists every fault."""


class ClaimError(AssertionError):
    """The finding in the ledger does not hold as measured."""


class UnknownClaim(LookupError):
    """No claim of this id is in the ledger."""


class WrongLesson(LookupError):
    """The ledger has no such lesson, or settles this claim in another one."""


@dataclass(frozen=True)
class Claim:
    """A popular statement, the verdict on it, and the finding that a lesson settles.

    Args:
        id: the claim's name in the ledger: small letters, digits and _.
        statement: what people say.
        verdict: one of VERDICTS.
        finding: what the lesson finds.
        source: who says so.
        lesson: the lesson that settles it, by its notebook's name.
        refs: ids of references.
    """

    id: str
    statement: str
    verdict: str
    finding: str
    source: str
    lesson: str
    refs: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What `claim` prints: the ledger's words, wrapped to a page, never a measured digit."""
        said = textwrap.wrap(f"people say: “{self.statement}”", 92)
        found = textwrap.wrap(f"{self.verdict.upper()}. Found: {self.finding}", 92)
        return f"✓ {self.id}\n  " + "\n  ".join(["\n    ".join(said), "\n    ".join(found)])


def load(path: Path) -> dict[str, Claim]:
    """Read a ledger.

    Args:
        path: a TOML file; `claims.toml` explains the format.

    Returns:
        id → Claim, in the file's order.

    Raises:
        LedgerError: the file is malformed; the message lists every fault.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LedgerError(f"{path.name} is not valid TOML: {error}") from None
    faults = [f"[{id}] {fault}" for id, table in tables.items() for fault in _faults(id, table)]
    if faults:
        raise LedgerError("\n  ".join([f"{path.name} is malformed ({len(faults)} faults):", *faults]))
    return {
        id: Claim(id, *(" ".join(table[key].split()) for key in TEXTS), tuple(table.get("refs", ())))
        for id, table in tables.items()
    }


def _faults(id: str, table) -> Iterator[str]:
    """What is wrong with one table of the ledger, in words."""
    if not isinstance(table, dict):
        yield f"= {table!r} is no table; write [{id}] above the keys {', '.join(TEXTS)}"
        return
    if not re.fullmatch(r"[a-z][a-z0-9_]*", id):
        yield "is no claim id; use small letters, digits and _, such as lora_parameter_count"
    for key in table.keys() - {*TEXTS, "refs"}:
        yield f"has the unknown key {key!r}; the keys are {', '.join(TEXTS)} and, optionally, refs"
    for key in TEXTS:
        if key not in table:
            yield f'lacks the key {key!r}; add {key} = "…"'
        elif not isinstance(table[key], str) or not table[key].strip():
            yield f"{key} = {table[key]!r} says nothing; write a non-empty text"
        elif key == "verdict" and table[key] not in VERDICTS:
            yield f"verdict = {table[key]!r} is unknown; choose one of {', '.join(VERDICTS)}"
        elif key == "lesson" and not re.fullmatch(r"\d\d_[a-z_]+", table[key]):
            yield f"lesson = {table[key]!r} is no lesson's name; write it as its notebook's, such as 01_svd_truncation"
    refs = table.get("refs", [])
    if not isinstance(refs, list) or not all(isinstance(ref, str) and ref.strip() for ref in refs):
        yield f'refs = {refs!r} is no list of reference ids; write it as ["A4", "C12"]'


def ledger() -> dict[str, Claim]:
    """The course's ledger, read afresh: id → Claim, in the file's order."""
    return load(LEDGER)


def lesson_claims(lesson: str) -> list[Claim]:
    """The claims that one lesson settles, in the ledger's order.

    Args:
        lesson: the notebook's name, such as "01_svd_truncation".

    Returns:
        The claims, at least one.

    Raises:
        WrongLesson: the ledger has no such lesson.
    """
    claims = list(ledger().values())
    found = [c for c in claims if c.lesson == lesson]
    if not found:
        known = ", ".join(sorted({c.lesson for c in claims}))
        raise WrongLesson(f"the ledger has no lesson {lesson!r}; it knows {known}; add new ones to claims.toml")
    return found


def claims_table(lesson: str) -> str:
    """The claims of one lesson as a Markdown table; show it with IPython.display.Markdown(…)."""
    rows = [("claim", "people say", "verdict", "found", "source"), ("---",) * 5]
    rows += [(f"`{c.id}`", c.statement, f"**{c.verdict}**", c.finding, c.source) for c in lesson_claims(lesson)]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)


def claim(id: str, holds: bool, /, **evidence) -> None:
    """Settle one claim: print its fixed lines if `holds`, else raise ClaimError with the evidence.

    Args:
        id: the claim's name in the ledger.
        holds: whether the ledger's *finding* is what was measured, so it is True for a refuted statement as well. A
            bool, a numpy bool or a tensor of one bool.
        **evidence: what was measured, by name; shown on failure.

    Raises:
        ClaimError: the finding does not hold as measured.
        UnknownClaim: no claim of this id is in the ledger.
        TypeError: id is not a string, or holds not one truth value.
    """
    _settle(id, holds, evidence)


def open_lesson(lesson: str) -> Callable[..., None]:
    """`claim`, bound to one lesson: it refuses a claim that the ledger settles in another.

    Args:
        lesson: the notebook's name, such as "01_svd_truncation".

    Returns:
        `claim(id, holds, **evidence)`. It prints the claim's fixed lines if `holds`, and raises ClaimError with the
        evidence if not; WrongLesson for a claim of another lesson; UnknownClaim for one that is not in the ledger.

    Raises:
        WrongLesson: the ledger has no such lesson.

    Example:
        >>> claim = open_lesson("01_svd_truncation")
        >>> claim("no_such_claim", 1 + 1 == 2)
        Traceback (most recent call last):
        ...
        lora_ref.course.claims.UnknownClaim: no claim 'no_such_claim' in the ledger; ...
    """
    lesson_claims(lesson)

    @wraps(claim)
    def bound(id: str, holds: bool, /, **evidence) -> None:
        _settle(id, holds, evidence, lesson)

    return bound


def _settle(id: str, holds: bool, evidence: dict, lesson: str | None = None) -> None:
    if not isinstance(id, str):
        raise TypeError(f'a claim\'s id must be a string, got {id!r}; write claim("id", holds, …)')
    claims = ledger()
    if id not in claims:
        near = " or ".join(repr(match) for match in difflib.get_close_matches(id, claims))
        hint = f"did you mean {near}? If it is new, " if near else ""
        raise UnknownClaim(f"no claim {id!r} in the ledger; {hint}add a table [{id}] to lora_ref/course/claims.toml")
    c = claims[id]
    if lesson not in (None, c.lesson):
        raise WrongLesson(
            f"the ledger settles claim {id!r} in lesson {c.lesson!r}, but this lesson is {lesson!r}; "
            "claim it there, or change its lesson in lora_ref/course/claims.toml"
        )
    if not _truth(id, holds):
        measured = ", ".join(f"{name} = {_short(value)}" for name, value in evidence.items())
        raise ClaimError(
            f"claim {id!r} does not hold as measured\n  statement: {c.statement}\n  verdict:   {c.verdict}\n"
            f"  finding:   {c.finding}\n  evidence:  {measured or 'none; pass it as claim(id, holds, name=value)'}"
        )
    print(c.text)


def _truth(id: str, holds) -> bool:
    """`holds` as a Python bool; anything but one truth value (bool, numpy's or torch's) is refused."""
    if isinstance(holds, bool):
        return holds
    dtype, shape = str(getattr(holds, "dtype", "")), tuple(getattr(holds, "shape", ()))
    if dtype in ("bool", "torch.bool") and not shape:
        return holds.item()
    got = f"{type(holds).__name__} of dtype {dtype} and shape {shape}" if dtype else repr(holds)
    mend = "reduce it with .all() or .any()" if shape else "write a comparison, such as error < 1e-6"
    raise TypeError(f"claim {id!r}: holds must be one truth value, got {got}; {mend}")


def _short(value) -> str:
    """A value for an error message: numbers plainly, anything long cut at 200 characters."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(repr(value).split())
    return text if len(text) <= 200 else text[:199] + "…"
