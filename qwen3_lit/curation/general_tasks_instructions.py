"""General tasks whose answers are judged by rules: instructions, formats and mode flags."""

import json
import random
from typing import Any

from qwen3_lit.curation.general_tasks import GeneralItem, GeneralOptions, general_task, user
from qwen3_lit.curation.general_tasks_words import (
    ADJECTIVES,
    COLORS,
    ENDINGS,
    KINDS_OF_THINGS,
    NOUNS,
    OPENINGS,
    VERBS,
    fact,
    phrase,
    recollection,
    sentence,
)
from qwen3_lit.rl.rewards.instruction_checks import describe_check

_REQUESTS = ("Write about the {}.", "Tell me about the {}.", "Say something about the {}.")


def _item(query: str, gold: str, *checks: dict[str, Any], wrong: str, reference: str | None = None) -> GeneralItem:
    """An item whose query is followed by its checks in words."""
    wording = " ".join(describe_check(check) for check in checks)
    return GeneralItem(
        messages=[user(f"{query} {wording}")],
        gold=gold,
        metadata={"checks": list(checks)},
        wrong=wrong,
        reference=reference,
    )


def _request(rng: random.Random) -> tuple[str, str]:
    noun = rng.choice(NOUNS)
    return rng.choice(_REQUESTS).format(noun), noun


@general_task("word_count")
def word_count(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """Exactly so many words."""
    query, noun = _request(rng)
    count = rng.randint(1, options.max_words)
    wrong = phrase(rng, noun, count + rng.randint(1, 2))
    return _item(query, phrase(rng, noun, count), {"name": "exact_words", "count": count}, wrong=wrong)


@general_task("keyword_inclusion")
def keyword_inclusion(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A given word must occur."""
    query, noun = _request(rng)
    keyword = rng.choice([word for word in NOUNS if word != noun])
    gold = f"The {noun} and the {keyword} are {rng.choice(ADJECTIVES)}."
    check = {"name": "include_word", "word": keyword, "count": 1}
    return _item(query, gold, check, wrong=sentence(rng, noun))


@general_task("letter_case")
def letter_case(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """Capitals only, or none."""
    query, noun = _request(rng)
    text = sentence(rng, noun)
    if rng.random() < 0.5:
        return _item(query, text.upper(), {"name": "all_upper"}, wrong=text)
    return _item(query, text.lower(), {"name": "all_lower"}, wrong=text.upper())


@general_task("start_with")
def start_with(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A given first word."""
    query, noun = _request(rng)
    opening = rng.choice(OPENINGS)
    text = sentence(rng, noun)
    gold = f"{opening}, {text[0].lower()}{text[1:]}"
    return _item(query, gold, {"name": "starts_with", "text": opening}, wrong=text)


@general_task("end_with")
def end_with(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A given last sentence."""
    query, noun = _request(rng)
    ending = rng.choice(ENDINGS)
    text = sentence(rng, noun)
    return _item(query, f"{text} {ending}", {"name": "ends_with", "text": ending}, wrong=text)


@general_task("json_output")
def json_output(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """One JSON object with given keys."""
    noun, color = rng.choice(NOUNS), rng.choice(COLORS)
    first, second = rng.choice((("name", "color"), ("thing", "color"), ("what", "how")))
    gold = json.dumps({first: noun, second: color})
    check = {"name": "json_object", "keys": [first, second]}
    return _item(f"The {noun} is {color}.", gold, check, wrong=f"{noun}, {color}")


@general_task("list_items")
def list_items(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """So many items of a kind, separated by commas."""
    kind = rng.choice(sorted(KINDS_OF_THINGS))
    things = KINDS_OF_THINGS[kind]
    count = rng.randint(2, max(2, min(options.max_items, len(things))))
    items = rng.sample(things, count)
    verb = rng.choice(("Name", "List", "Give me"))
    check = {"name": "separated_list", "count": count, "separator": ","}
    return _item(f"{verb} {kind}.", ", ".join(items), check, wrong=" ".join(items))


@general_task("boxed_answer")
def boxed_answer(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A small sum, the result boxed."""
    left, right = rng.randint(0, 19), rng.randint(0, 9)
    query = rng.choice(("What is {} + {}?", "Add {} and {}.")).format(left, right)
    total = str(left + right)
    return _item(query, f"\\boxed{{{total}}}", {"name": "boxed"}, wrong=total, reference=total)


@general_task("forbidden_word")
def forbidden_word(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A word that must not occur, although the topic invites it."""
    query, noun = _request(rng)
    forbidden = rng.choice(("the", noun))
    adjective = rng.choice(ADJECTIVES)
    gold = f"A {adjective} {noun} {rng.choice(VERBS)}." if forbidden == "the" else f"It is {adjective} and it moves."
    return _item(query, gold, {"name": "forbid_word", "word": forbidden}, wrong=sentence(rng, noun))


@general_task("repeat_back")
def repeat_back(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """One word, so many times."""
    word, count = rng.choice(NOUNS), rng.randint(2, max(2, options.max_items))
    check = {"name": "repeat_word", "word": word, "count": count}
    start = rng.choice(("Repeat after me.", "Say it again.", "A small exercise."))
    return _item(start, " ".join([word] * count), check, wrong=" ".join([word] * (count + 1)))


@general_task("numbered_points")
def numbered_points(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A numbered list."""
    kind = rng.choice(sorted(KINDS_OF_THINGS))
    things = KINDS_OF_THINGS[kind]
    count = rng.randint(2, max(2, min(options.max_items, len(things))))
    items = rng.sample(things, count)
    gold = "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
    verb = rng.choice(("Name", "List", "Give me"))
    return _item(f"{verb} {kind}.", gold, {"name": "numbered_list", "count": count}, wrong=", ".join(items))


@general_task("quoted_answer")
def quoted_answer(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """The whole answer in quotation marks."""
    query, noun = _request(rng)
    text = sentence(rng, noun)
    return _item(query, f'"{text}"', {"name": "quoted"}, wrong=text)


@general_task("title")
def title(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A title in angular brackets."""
    query, noun = _request(rng)
    return _item(query, f"<<the {noun}>> {sentence(rng, noun)}", {"name": "title"}, wrong=sentence(rng, noun))


@general_task("mode_flags")
def mode_flags(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A dialog of several turns with flags at random; the last one decides (Qwen3 report, section 4.3)."""
    turns = rng.randint(1, options.max_turns)
    plain: list[dict[str, Any]] = []
    flagged: list[dict[str, Any]] = []
    mode, gold, wrong = "think", "", ""
    for turn in range(turns):
        question, gold, others = fact(rng)
        wrong = rng.choice(others)
        # The last turn always has a flag: a task about flags should not be won by the default.
        flag = rng.choice(("think", "no_think")) if turn == turns - 1 else rng.choice(("think", "no_think", ""))
        mode = flag or mode
        plain.append(user(question))
        flagged.append(user(f"{question} /{flag}" if flag else question))
        if turn < turns - 1:
            answer = {"role": "assistant", "content": gold}
            plain.append(answer)
            flagged.append(answer)
    return GeneralItem(
        messages=flagged, plain_messages=plain, gold=gold, wrong=wrong, thinking=recollection(gold), mode=mode
    )
