"""Data to text: records of slots and values, and sentences that say them, from grammars of this project.

    name[Miller's Table], eatType[pub], priceRange[cheap], area[riverside]
    Down by the river there is a cheap pub called Miller's Table.

The records look like the E2E challenge's (restaurants), so that its data can take their place; the names and
the sentences are our own. A second domain, the weather, is for transfer and forgetting. Each value can be worded in
several ways, slots come in varying order, in one sentence or three, so that no template gets far.
"""

import random
from dataclasses import dataclass

from ..._checks import check_integer

NAMES = (
    "Miller's Table,The Golden Oar,Saffron Lane,The Copper Pot,Harbour Lights,Olive and Thyme,The Old Mill,"
    "Lantern House,The Blue Heron,Juniper Court,Red Brick Kitchen,The Willow Tree,Fennel and Rye,The Quiet Fox,"
    "Marigold,The Brass Kettle,Northgate,The Seven Stairs,Amber Room,The Stone Bridge"
).split(",")
TOWNS = "Norwick,Ashford Bay,Elmstead,Kings Hollow,Redmoor,Saltmarsh,Thornby,Westerley,Birchwood,Lowfield".split(",")

# slot → value → the ways to say it. The slot-error rate looks for these words, so no way of one value is part of
# a way of another value of its slot.
RESTAURANTS = {
    "eatType": {"pub": ["pub"], "restaurant": ["restaurant"], "coffee shop": ["coffee shop", "café"]},
    "food": {
        kind: [kind] for kind in ("Italian", "Chinese", "Indian", "French", "English", "Japanese", "Mexican", "Greek")
    },
    "priceRange": {
        "cheap": ["cheap", "inexpensive", "low-priced"],
        "moderate": ["moderately priced", "mid-priced", "averagely priced"],
        "high": ["costly", "high-priced", "upmarket"],
    },
    "customer rating": {
        "low": ["low customer rating", "poorly rated", "few good reviews"],
        "average": ["average customer rating", "rated as average", "mixed reviews"],
        "high": ["high customer rating", "highly rated", "excellent reviews"],
    },
    "area": {
        "riverside": ["by the river", "on the riverside", "along the river"],
        "city centre": ["in the city centre", "in the middle of town", "in the heart of the city"],
    },
    "familyFriendly": {
        "yes": ["family friendly", "welcomes families", "good for children"],
        "no": ["for adults only", "unsuitable for children", "does not admit children"],
    },
    "near": {name: [f"near {name}", f"close to {name}", f"not far from {name}"] for name in NAMES},
}
WEATHER = {
    "day": {day: [day] for day in "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()},
    "sky": {
        "clear": ["clear skies", "plenty of sunshine", "not a cloud"],
        "cloudy": ["grey clouds", "an overcast sky", "little sun"],
        "changing": ["sun and clouds in turn", "some sunny spells", "a changing sky"],
    },
    "temperature": {
        "cold": ["cold", "chilly", "near freezing"],
        "mild": ["mild", "pleasant", "agreeably warm"],
        "hot": ["hot", "sweltering", "baking"],
    },
    "wind": {
        "calm": ["hardly any wind", "no wind to speak of", "a calm air"],
        "breeze": ["a light breeze", "a gentle breeze", "some breeze"],
        "strong": ["strong wind", "stiff gusts", "a gale"],
    },
    "rain": {
        "none": ["dry", "without rain", "free of rain"],
        "showers": ["a few showers", "scattered showers", "a shower or two"],
        "heavy": ["heavy rain", "a downpour", "rain in torrents"],
    },
}
DOMAINS = {"restaurants": RESTAURANTS, "weather": WEATHER}


@dataclass(frozen=True)
class Example:
    """A record and one way, or several, to say it. `domain` is a key of DOMAINS."""

    domain: str
    slots: dict[str, str]
    texts: list[str]

    @property
    def meaning(self) -> str:
        """The record in E2E's notation: name[…], eatType[…], …"""
        return ", ".join(f"{slot}[{value}]" for slot, value in self.slots.items())


def examples(domain: str, n: int, seed: int = 0, texts: int = 1) -> list[Example]:
    """n examples with distinct records; the same seed gives the same ones, and more of them for a larger n.

    Errors: ValueError for an unknown domain, n < 1, texts < 1.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain = {domain!r} is unknown; choose one of {', '.join(DOMAINS)}")
    n, texts = check_integer(n, "n", 1), check_integer(texts, "texts", 1)
    rng, seen, found = random.Random(f"{domain} {seed}"), set(), []
    while len(found) < n:
        slots = _record(domain, rng)
        key = tuple(slots.items())
        if key not in seen:
            seen.add(key)
            found.append(Example(domain, slots, [say(domain, slots, rng) for _ in range(texts)]))
    return found


def say(domain: str, slots: dict[str, str], rng: random.Random) -> str:
    """One of the many ways to say a record."""
    return (_say_restaurant if domain == "restaurants" else _say_weather)(slots, rng)


def slot_errors(example: Example, text: str) -> tuple[int, int]:
    """(errors, slots): slots of the record that the text does not say, plus values that it says against it.

    A value is said if one of its wordings stands in the text, in any case; the name and the town by themselves.
    """
    low, errors = f" {text.lower()} ", 0
    for slot, value in example.slots.items():
        if slot in ("name", "town"):
            errors += value.lower() not in low
    for slot, values in DOMAINS[example.domain].items():
        said = {value for value, ways in values.items() if any(_stands(way.lower(), low) for way in ways)}
        wanted = {example.slots[slot]} if slot in example.slots else set()
        errors += len(said ^ wanted)
    return errors, len(example.slots)


def slot_error_rate(found: list[tuple[Example, str]]) -> float:
    """Errors per slot over (example, text) pairs: 0 is perfect; can exceed 1. Errors: ValueError for no pairs."""
    if not found:
        raise ValueError("there are no texts to judge; pass at least one (example, text)")
    errors, slots = zip(*(slot_errors(example, text) for example, text in found))
    return sum(errors) / sum(slots)


def _stands(way: str, text: str) -> bool:
    """Whether the words stand in the text as whole words."""
    at = text.find(way)
    while at >= 0:
        if not text[at - 1].isalpha() and not text[at + len(way)].isalpha():
            return True
        at = text.find(way, at + 1)
    return False


def _record(domain: str, rng: random.Random) -> dict[str, str]:
    if domain == "restaurants":
        name, near = rng.sample(NAMES, 2)
        chosen = {"name": name, "eatType": rng.choice(list(RESTAURANTS["eatType"]))}
        optional = ["food", "priceRange", "customer rating", "area", "familyFriendly", "near"]
        keep = set(rng.sample(optional, rng.randint(2, 6)))
        for slot in optional:
            if slot in keep:
                chosen[slot] = near if slot == "near" else rng.choice(list(RESTAURANTS[slot]))
        return chosen
    chosen = {"town": rng.choice(TOWNS), "day": rng.choice(list(WEATHER["day"]))}
    keep = set(rng.sample(["sky", "temperature", "wind", "rain"], rng.randint(2, 4)))
    return chosen | {slot: rng.choice(list(WEATHER[slot])) for slot in WEATHER if slot in keep}


def _article(phrase: str) -> str:
    return ("an " if phrase[0].lower() in "aeiou" else "a ") + phrase


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _say_restaurant(slots: dict[str, str], rng: random.Random) -> str:
    """A first sentence with the name, its kind and some slots, then what is left in one sentence or more."""
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


def _say_weather(slots: dict[str, str], rng: random.Random) -> str:
    """Where and when, then what the sky, the air, the wind and the rain do, in varying order."""
    town, word = slots["town"], {s: rng.choice(WEATHER[s][v]) for s, v in slots.items() if s != "town"}
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
