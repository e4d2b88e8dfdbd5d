"""A small made-up data set in MNLI's format, for trying the recipe without a download.

    python -m transformers_dylora.toy_mnli DIRECTORY

Templates with random words make premises and hypotheses about who gave what to whom, how many, how much more, where,
when and whether. Labels follow from the words' meaning, so that an encoder must compare the two sentences; matched and
mismatched validation differ in their verbs and things. Deterministic for a seed.
"""

import json
import random
import sys
from pathlib import Path

from loralib.files import write_text

ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)
PEOPLE = [
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Elena",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Simon",
    "Tara",
    "Victor",
]
PLACES = ["kitchen", "garden", "library", "station", "market", "harbour", "school", "museum", "office", "church"]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey"]
NUMBERS = dict(
    enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], start=2)
)
KINDS = {  # thing: what kind of thing it is
    "dog": "animal", "horse": "animal", "cat": "animal", "rabbit": "animal",
    "apple": "fruit", "pear": "fruit", "banana": "fruit", "plum": "fruit",
    "chair": "piece of furniture", "table": "piece of furniture", "sofa": "piece of furniture",
    "hammer": "tool", "drill": "tool", "saw": "tool",
}  # fmt: skip
OTHER_KINDS = {
    "violin": "instrument", "flute": "instrument", "guitar": "instrument", "trumpet": "instrument",
    "carrot": "vegetable", "onion": "vegetable", "cabbage": "vegetable",
    "shirt": "piece of clothing", "coat": "piece of clothing", "scarf": "piece of clothing",
}  # fmt: skip
GIVING = {"gave": "received", "sold": "bought", "lent": "borrowed"}
OTHER_GIVING = {"sent": "got", "handed": "received", "taught": "learned"}
OPPOSITES = [
    ("tall", "short"),
    ("old", "young"),
    ("fast", "slow"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("heavy", "light"),
]
REASONS = [
    "because it was raining",
    "to please a friend",
    "for the first time",
    "before breakfast",
    "without telling anyone",
]


def _an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _exchange(rng, label, kinds, giving):
    """Who gave what to whom: the roles decide."""
    giver, taker, other = rng.sample(PEOPLE, 3)
    thing = rng.choice(list(kinds))
    gave, received = rng.choice(list(giving.items()))
    premise = f"{giver} {gave} {_an(thing)} to {taker}."
    if label == ENTAILMENT:
        return premise, rng.choice(
            [f"{taker} {received} {_an(thing)} from {giver}.", f"{giver} {gave} {_an(kinds[thing])} to {taker}."]
        )
    if label == CONTRADICTION:
        return premise, rng.choice(
            [f"{giver} {received} the {thing} from {taker}.", f"{giver} did not part with {_an(kinds[thing])}."]
        )
    return premise, rng.choice(
        [f"{taker} {gave} {_an(thing)} to {other}.", f"{giver} {gave} {_an(thing)} to {taker} {rng.choice(REASONS)}."]
    )


def _count(rng, label, kinds, giving):
    """How many: numbers must be compared."""
    person = rng.choice(PEOPLE)
    thing, place = rng.choice([t for t in kinds if t != "scarf"]), rng.choice(PLACES)
    n = rng.choice(list(NUMBERS)[3:-3])
    premise = f"{person} counted {NUMBERS[n]} {thing}s in the {place}."
    less, more = rng.choice([m for m in NUMBERS if m < n]), rng.choice([m for m in NUMBERS if m > n])
    start = f"There were {{}} {thing}s in the {place}."
    if label == ENTAILMENT:
        return premise, start.format(rng.choice([f"more than {NUMBERS[less]}", f"fewer than {NUMBERS[more]}"]))
    if label == CONTRADICTION:
        return premise, start.format(rng.choice([f"more than {NUMBERS[more]}", f"fewer than {NUMBERS[less]}"]))
    return premise, f"The {thing}s in the {place} were {rng.choice(COLOURS)}."


def _comparison(rng, label, kinds, giving):
    """Who is more: order and opposites decide."""
    a, b, c = rng.sample(PEOPLE, 3)
    word, opposite = rng.choice(OPPOSITES)[:: rng.choice([1, -1])]
    er = lambda w: {"heavy": "heavier"}.get(w, w + "er")  # noqa: E731
    premise = f"{a} is {er(word)} than {b}."
    if label == ENTAILMENT:
        return premise, rng.choice([f"{b} is {er(opposite)} than {a}.", f"{b} is not {er(word)} than {a}."])
    if label == CONTRADICTION:
        return premise, rng.choice([f"{b} is {er(word)} than {a}.", f"{a} is {er(opposite)} than {b}."])
    return premise, rng.choice([f"{a} is {er(word)} than {c}.", f"{c} is {er(opposite)} than {b}."])


def _quantity(rng, label, kinds, giving):
    """All, some, none."""
    thing, place = rng.choice(list(kinds)), rng.choice(PLACES)
    colour, other = rng.sample(COLOURS, 2)
    premise = f"All {thing}s in the {place} are {colour}."
    if label == ENTAILMENT:
        return premise, rng.choice(
            [f"No {thing} in the {place} is {other}.", f"Every {thing} in the {place} is {colour}."]
        )
    if label == CONTRADICTION:
        return premise, rng.choice(
            [f"Some {thing}s in the {place} are {other}.", f"No {thing} in the {place} is {colour}."]
        )
    return premise, rng.choice(
        [
            f"All {thing}s in the {place} are old.",
            f"Some {thing}s in the {rng.choice([p for p in PLACES if p != place])} are {colour}.",
        ]
    )


def _moving(rng, label, kinds, giving):
    """Where and when: before and after."""
    person = rng.choice(PEOPLE)
    first, then, other = rng.sample(PLACES, 3)
    premise = f"{person} was in the {first} and then walked to the {then}."
    if label == ENTAILMENT:
        return premise, rng.choice(
            [f"{person} left the {first} for the {then}.", f"{person} was in the {first} before reaching the {then}."]
        )
    if label == CONTRADICTION:
        return premise, rng.choice(
            [f"{person} left the {then} for the {first}.", f"{person} was in the {then} before reaching the {first}."]
        )
    return premise, rng.choice(
        [f"{person} left the {then} for the {other}.", f"{person} walked to the {then} {rng.choice(REASONS)}."]
    )


TEMPLATES = (_exchange, _count, _comparison, _quantity, _moving)


def examples(n: int, seed: int, mismatched: bool = False) -> list[dict]:
    """``n`` different examples; labels and templates come equally often."""
    rng = random.Random(f"toy-mnli:{seed}:{mismatched}")
    kinds, giving = (OTHER_KINDS, OTHER_GIVING) if mismatched else (KINDS, GIVING)
    found = {}
    while len(found) < n:
        k = len(found)
        label = k % 3
        pair = TEMPLATES[k // 3 % len(TEMPLATES)](rng, label, kinds, giving)
        found.setdefault(pair, label)
    rows = [{"premise": p, "hypothesis": h, "label": label} for (p, h), label in found.items()]
    rng.shuffle(rows)
    return [row | {"idx": i} for i, row in enumerate(rows)]


def write_data(directory: str | Path, train: int = 4200, validation: int = 600, seed: int = 0) -> Path:
    """Write train, validation_matched, validation_mismatched and the two test splits (labels hidden) as JSON lines."""
    directory = Path(directory)
    everything = examples(train + 2 * validation, seed)
    splits = {"train": everything[:train], "validation_matched": everything[train : train + validation]}
    splits["test_matched"] = [row | {"label": -1} for row in everything[train + validation :]]
    other = examples(2 * validation, seed, mismatched=True)
    splits["validation_mismatched"] = other[:validation]
    splits["test_mismatched"] = [row | {"label": -1} for row in other[validation:]]
    for name, rows in splits.items():
        text = "".join(json.dumps(row | {"idx": i}) + "\n" for i, row in enumerate(rows))
        write_text(directory / f"{name}.jsonl", text)
    return directory


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write_data(sys.argv[1]))
