"""A small grammar of sentences about a coloured digit: what it is, its ink, its ground and its place.

A frame is an order of parts and a wording of each; articles, commas and a full stop vary besides. One frame
in five, among them all of three orders, is held out: no training reads a sentence of these.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import permutations

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Wordings of the parts; {a} is an article or nothing. `both` is digit and ink in one.
PARTS = {
    "both": (
        "{a} {ink} {digit}", "{a} {ink} number {digit}", "{digit} in {ink}", "the digit {digit} in {ink} ink",
    ),
    "digit": ("{digit}", "{a} {digit}", "number {digit}", "the digit {digit}", "the figure {digit}"),
    "ink": ("in {ink}", "painted {ink}", "{ink} ink", "written in {ink}", "drawn in {ink}"),
    "ground": (
        "on {ground}", "on {a} {ground} background", "against {ground}", "{ground} ground",
        "over {ground} paper",
    ),
    "place": ("on the {place}", "at the {place}", "to the {place}", "{place} side", "{place}"),
}  # fmt: skip
ORDERS = (*permutations(("both", "ground", "place")), *permutations(("digit", "ink", "ground", "place")))
WORDINGS = 10  # of each order
HELD_OUT_ORDERS = (4, 11, 22)  # place, both, ground; digit, place, ground, ink; ground, place, digit, ink
LONGEST = 17  # words and marks, without the end of the sentence

Frame = tuple[str, ...]


@cache
def frames() -> tuple[tuple[Frame, ...], tuple[Frame, ...]]:
    """Those to train on, and those held out; each is the wordings of its parts, in order."""
    train: list[Frame] = []
    held_out: list[Frame] = []
    for number, order in enumerate(ORDERS):
        dice = random.Random(number)
        chosen: dict[Frame, None] = {}
        while len(chosen) < WORDINGS:
            chosen[tuple(dice.choice(PARTS[part]) for part in order)] = None
        kept = 0 if number in HELD_OUT_ORDERS else WORDINGS - 1
        train += list(chosen)[:kept]
        held_out += list(chosen)[kept:]
    return tuple(train), tuple(held_out)


def sentence(digit: int, ink: str, ground: str, place: str, frame: Frame, dice: random.Random) -> str:
    """A sentence of a frame: the digit as a word or a figure, articles, commas and a full stop at random."""
    separator = dice.choice((" ", " , "))
    text = separator.join(frame) + dice.choice(("", "", " ."))
    while "{a}" in text:
        text = text.replace("{a}", dice.choice(("a", "the", "")), 1)
    name = NUMBERS[digit] if dice.random() < 0.6 else str(digit)
    said = text.format(digit=name, ink=ink, ground=ground, place=place).split()
    if len(said) < LONGEST and dice.random() < 0.1:
        said.insert(dice.randrange(len(said) + 1), "please")  # a word that no tokenizer of it knows
    return " ".join(said).replace(" ,", ",").replace(" .", ".")


def words(colours: tuple[str, ...], places: tuple[str, ...]) -> tuple[str, ...]:
    """All words of the grammar, sorted."""
    fixed = " ".join(wording for wordings in PARTS.values() for wording in wordings).split()
    fixed = [word for word in fixed if "{" not in word]
    digits = [*NUMBERS, *map(str, range(10))]
    return tuple(sorted({*fixed, *digits, *colours, *places, "a", "the", "an", "and", "with", ",", "."}))
