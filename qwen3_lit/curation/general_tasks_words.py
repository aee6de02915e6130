"""The small, plain vocabulary of the general tasks: word lists, phrases made of them, and a table of facts.

Words are short and common, so that nearly each of them is one token in a vocabulary of a few thousand.
"""

import random

_NOUNS = """dog cat bird fish horse cow sheep duck bear lion tree flower grass river sea lake hill moon sun star cloud
    rain snow wind fire stone sand road house door window room table chair bed box bag book page letter pen cup plate
    bread milk apple egg cake tea car bus train ship ball game song king child girl boy man friend farm city school shop
    garden"""
_ADJECTIVES = """red blue green white black big small old new good nice fast slow warm cold dark light long short soft
    hard clean full quiet happy kind young strong"""
COLORS = ("red", "blue", "green", "white", "black", "yellow", "brown", "pink")
PLACES = ("box", "bag", "house", "garden", "room", "car", "school", "shop")
_VERBS = "runs sleeps moves waits shines falls stops grows turns sings plays rests works stands"
_ADVERBS = "here there now today again slowly well always often fast"
NOUNS, ADJECTIVES = tuple(_NOUNS.split()), tuple(_ADJECTIVES.split())
VERBS, ADVERBS = tuple(_VERBS.split()), tuple(_ADVERBS.split())
OPENINGS = ("Today", "Now", "Yes", "Look", "Here", "Well", "So", "Listen")
ENDINGS = ("The end.", "Thank you.", "That is all.", "Good day.", "Bye.", "Well done.")

KINDS_OF_THINGS: dict[str, tuple[str, ...]] = {
    "animals": ("dog", "cat", "bird", "fish", "horse", "cow", "sheep", "duck", "bear", "lion"),
    "colors": COLORS,
    "foods": ("bread", "milk", "apple", "egg", "cake", "tea", "rice", "soup"),
    "things in a house": ("door", "window", "room", "table", "chair", "bed", "cup", "plate"),
    "ways to travel": ("car", "bus", "train", "ship", "horse", "bike"),
}

_OPPOSITES = (
    "big small, hot cold, fast slow, old new, up down, day night, left right, open closed, full empty, hard soft, "
    "light dark, long short, good bad, high low, in out, on off, wet dry, rich poor, early late, strong weak"
)
_SOUNDS = "dog woof, cat meow, cow moo, sheep baa, duck quack, lion roar, bee buzz"
_COLORS_OF = "grass green, snow white, coal black, blood red, milk white, a lemon yellow, the sky blue"
_CAPITALS = "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Germany Berlin, China Beijing, Peru Lima"
_NEXT_DAYS = "Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, Saturday Sunday"


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(pair.rsplit(" ", 1)[0].strip(), pair.rsplit(" ", 1)[1]) for pair in text.split(",")]


FACTS: tuple[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    (
        ("What is the opposite of {}?", "Name the opposite of {}.", "Which word is the opposite of {}?"),
        tuple(_pairs(_OPPOSITES) + [(answer, subject) for subject, answer in _pairs(_OPPOSITES)]),
    ),
    (("What sound does a {} make?", "Which sound comes from a {}?", "A {} makes what sound?"), tuple(_pairs(_SOUNDS))),
    (("What color is {}?", "Name the color of {}.", "Which color has {}?"), tuple(_pairs(_COLORS_OF))),
    (
        ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"),
        tuple(_pairs(_CAPITALS)),
    ),
    (("Which day comes after {}?", "Name the day after {}.", "What day follows {}?"), tuple(_pairs(_NEXT_DAYS))),
)
"""Wordings of a question and the (subject, answer) pairs it can be asked about."""


def phrase(rng: random.Random, noun: str, count: int) -> str:
    """A phrase of exactly ``count`` words about a noun, without punctuation."""
    pattern = [[noun], [rng.choice(ADJECTIVES), noun], ["the", rng.choice(ADJECTIVES), noun]]
    if count <= 3:
        return " ".join(pattern[count - 1])
    words = [*pattern[2], rng.choice(VERBS)]
    while len(words) < count:
        words += rng.choice((["and", rng.choice(VERBS)], [rng.choice(ADVERBS)]))
    if len(words) > count:  # an "and" that lost its verb
        words[count - 1 :] = [rng.choice(ADVERBS)]
    return " ".join(words)


def sentence(rng: random.Random, noun: str) -> str:
    """A short sentence about a noun."""
    return f"The {rng.choice(ADJECTIVES)} {noun} {rng.choice(VERBS)}."


def fact(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """A question, its answer and the answers of the other questions of its kind."""
    wordings, pairs = rng.choice(FACTS)
    subject, answer = rng.choice(pairs)
    others = tuple(sorted({other for _, other in pairs} - {answer}))
    return rng.choice(wordings).format(subject), answer, others


def recollection(answer: str) -> str:
    """Thinking that leads to the answer of a question of fact."""
    return f"This is a question of fact. I recall: {answer}."
