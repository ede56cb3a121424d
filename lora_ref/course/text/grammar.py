"""Data to text: records of slots and values, and sentences that express them, from grammars of this project.

    name[Miller's Table], eatType[pub], priceRange[cheap], area[riverside]
    Down by the river there is a cheap pub called Miller's Table.

The records have the form of the E2E challenge's (restaurants), so that its data can replace them; the names and the
sentences are our own. A second domain, the weather, is for transfer and forgetting. Each value has several wordings,
and slots come in varying order, in one sentence or more, so that a fixed template does not get far.
"""

import random
from dataclasses import dataclass

from ..._checks import check_integer
from .vocabulary import DOMAINS, NAMES, RESTAURANTS, TOWNS, WEATHER


@dataclass(frozen=True)
class Example:
    """A record and its reference texts.

    Args:
        domain: a key of DOMAINS; "e2e" for records of the E2E challenge.
        slots: slot → value.
        texts: the references, each of which expresses all of the record.

    Example:
        >>> example = Example("weather", {"town": "Elmstead", "rain": "none"}, ["Dry in Elmstead."])
        >>> example.meaning
        'town[Elmstead], rain[none]'
    """

    domain: str
    slots: dict[str, str]
    texts: list[str]

    @property
    def meaning(self) -> str:
        """The meaning representation, in E2E's notation: name[…], eatType[…], …"""
        return ", ".join(f"{slot}[{value}]" for slot, value in self.slots.items())


def examples(domain: str, n: int, seed: int = 0, texts: int = 1) -> list[Example]:
    """Random examples with distinct records.

    The same seed gives the same examples, and a larger n gives more of them after the same first ones.

    Args:
        domain: a key of DOMAINS: "restaurants" or "weather".
        n: how many examples, 1 or more.
        seed: of the generator, which serves this call alone.
        texts: how many texts for each record, 1 or more.

    Returns:
        The n examples.

    Raises:
        ValueError: an unknown domain, n < 1 or texts < 1.

    Example:
        >>> (example,) = examples("weather", 1, seed=4)
        >>> example.meaning
        'town[Kings Hollow], day[Monday], temperature[mild], rain[none]'
        >>> example.texts
        ['For Monday, Kings Hollow: it will stay dry and it will be pleasant.']
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain = {domain!r} is unknown; choose one of {', '.join(DOMAINS)}")
    n, texts = check_integer(n, "n", 1), check_integer(texts, "texts", 1)
    rng, seen, found = random.Random(f"{domain} {seed}"), set(), []
    while len(found) < n:
        slots = _random_record(domain, rng)
        key = tuple(slots.items())
        if key not in seen:
            seen.add(key)
            found.append(Example(domain, slots, [realize(domain, slots, rng) for _ in range(texts)]))
    return found


def realize(domain: str, slots: dict[str, str], rng: random.Random) -> str:
    """One of the many texts that express a record."""
    if domain == "restaurants":
        return _realize_restaurant(slots, rng)
    return _realize_weather(slots, rng)


def slot_errors(example: Example, text: str) -> tuple[int, int]:
    """(errors, slots): slots of the record that the text leaves out, plus values that contradict the record.

    A value is expressed if one of its wordings occurs in the text, in upper or lower case. A name or a town has one
    wording, itself.
    """
    low, errors = f" {text.lower()} ", 0
    for slot, value in example.slots.items():
        if slot in ("name", "town"):
            errors += value.lower() not in low
    for slot, values in DOMAINS[example.domain].items():
        expressed = {
            value
            for value, wordings in values.items()
            if any(_contains_words(wording.lower(), low) for wording in wordings)
        }
        expected = {example.slots[slot]} if slot in example.slots else set()
        errors += len(expressed ^ expected)
    return errors, len(example.slots)


def slot_error_rate(found: list[tuple[Example, str]]) -> float:
    """Slot errors over slots, of all texts together.

    An error is a slot of the record that the text leaves out, or a value in the text that contradicts the record (a
    wrong value counts twice, as one missing and one added).

    Args:
        found: (example, text to judge) pairs.

    Returns:
        Errors per slot: 0 is perfect; can exceed 1.

    Raises:
        ValueError: no pairs.

    Example:
        >>> pub = Example("restaurants", {"name": "The Old Mill", "eatType": "pub", "area": "riverside"}, [])
        >>> slot_error_rate([(pub, "The Old Mill is a pub by the river.")])
        0.0
        >>> slot_error_rate([(pub, "The Old Mill is a cheap pub by the river.")])  # cheap is not in the record
        0.3333333333333333
    """
    if not found:
        raise ValueError("there are no texts to judge; pass at least one (example, text)")
    errors, slots = zip(*(slot_errors(example, text) for example, text in found), strict=True)
    return sum(errors) / sum(slots)


def _contains_words(words: str, text: str) -> bool:
    """Whether the words occur in the text as whole words; the text begins and ends with a space."""
    at = text.find(words)
    while at >= 0:
        if not text[at - 1].isalpha() and not text[at + len(words)].isalpha():
            return True
        at = text.find(words, at + 1)
    return False


def _random_record(domain: str, rng: random.Random) -> dict[str, str]:
    if domain == "restaurants":
        name, near = rng.sample(NAMES, 2)
        chosen = {"name": name, "eatType": rng.choice(list(RESTAURANTS["eatType"]))}
        optional = ["food", "priceRange", "customer rating", "area", "familyFriendly", "near"]
        selected = set(rng.sample(optional, rng.randint(2, 6)))
        for slot in optional:
            if slot in selected:
                chosen[slot] = near if slot == "near" else rng.choice(list(RESTAURANTS[slot]))
        return chosen
    chosen = {"town": rng.choice(TOWNS), "day": rng.choice(list(WEATHER["day"]))}
    selected = set(rng.sample(["sky", "temperature", "wind", "rain"], rng.randint(2, 4)))
    return chosen | {slot: rng.choice(list(WEATHER[slot])) for slot in WEATHER if slot in selected}


def _article(phrase: str) -> str:
    return ("an " if phrase[0].lower() in "aeiou" else "a ") + phrase


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _realize_restaurant(slots: dict[str, str], rng: random.Random) -> str:
    """A first sentence with the name, its kind and some slots, then the other slots in one sentence or more."""
    word = {slot: rng.choice(RESTAURANTS[slot][value]) for slot, value in slots.items() if slot != "name"}
    name, kind = slots["name"], word["eatType"]
    before = [slot for slot in ("priceRange", "food") if slot in word and rng.random() < 0.6]
    after = [slot for slot in ("area", "near") if slot in word and rng.random() < 0.6]
    noun = " ".join([*(word[slot] for slot in before), kind])
    place = " ".join(word[slot] for slot in rng.sample(after, len(after)))
    first = rng.choice(("is", "called", "there", "offers"))
    if first == "there" and place:
        opening = f"{place} there is {_article(noun)} called {name}"
    elif first == "called":
        opening = (
            f"{_article(noun)} called {name} can be found {place}"
            if place
            else f"there is {_article(noun)} called {name}"
        )
    else:
        opening = f"{name} is {_article(noun)}" + (f" {place}" if place else "")
    rest = [slot for slot in word if slot not in ("eatType", *before, *after)]
    rng.shuffle(rest)
    clauses = [_clause(slot, word[slot], rng) for slot in rest]
    sentences = [opening]
    while clauses:
        take = clauses[: rng.randint(1, 3)]
        clauses = clauses[len(take) :]
        subject = rng.choice(("it", f"the {kind}", "the place"))
        sentences.append(f"{subject} {_join(take)}")
    return " ".join(map(_sentence, sentences))


def _clause(slot: str, word: str, rng: random.Random) -> str:
    """What can follow "it" for this slot and wording."""
    if slot == "food":
        return rng.choice((f"serves {word} food", f"offers {word} dishes", f"has a menu of {word} food"))
    if slot == "customer rating":
        if "rating" in word:
            return f"has {_article(word)}"
        return f"has {word}" if "reviews" in word else f"is {word}"
    if slot == "familyFriendly" and word.startswith(("welcomes", "does not")):
        return word
    if slot in ("area", "near"):
        return rng.choice((f"lies {word}", f"is {word}", f"can be found {word}"))
    return f"is {word}"


def _realize_weather(slots: dict[str, str], rng: random.Random) -> str:
    """Where and when, then sky, temperature, wind and rain in varying order."""
    town = slots["town"]
    word = {slot: rng.choice(WEATHER[slot][value]) for slot, value in slots.items() if slot != "town"}
    where = rng.choice((f"on {word['day']} in {town}", f"in {town} on {word['day']}", f"for {word['day']}, {town}"))
    clauses = []
    for slot in rng.sample([s for s in word if s != "day"], len(word) - 1):
        if slot in ("temperature", "rain") and not any(
            c in word[slot] for c in ("shower", "downpour", "heavy", "torrents")
        ):
            clauses.append(f"it will {rng.choice(('be', 'stay'))} {word[slot]}")
        else:
            clauses.append(rng.choice((f"there will be {word[slot]}", f"we expect {word[slot]}")))
    cut = rng.randint(1, len(clauses))
    sentences = [
        f"{where} {_join(clauses[:cut])}" if not where.startswith("for") else f"{where}: {_join(clauses[:cut])}"
    ]
    if clauses[cut:]:
        sentences.append(_join(clauses[cut:]))
    return " ".join(map(_sentence, sentences))
