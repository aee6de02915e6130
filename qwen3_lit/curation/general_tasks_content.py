"""General tasks about content: questions for a judge or a reward model, grounded answers, word mapping, tool use."""

import random
from typing import Any

from qwen3_lit.curation.general_tasks import GeneralItem, GeneralOptions, general_task, user
from qwen3_lit.curation.general_tasks_words import ADJECTIVES, COLORS, NOUNS, PLACES, VERBS, fact, recollection
from qwen3_lit.rl.calculator import evaluate

NOT_STATED = "not stated"

CALCULATOR_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate arithmetic.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
"""The calculator as a tool schema; short, because it stands in the system turn of every such problem."""

_OPEN_QUESTIONS = (
    "What do you think of the {}?",
    "Why do people like the {}?",
    "Describe the {}.",
    "Tell me a story about the {}.",
    "What is nice about the {}?",
    "How was your day with the {}?",
)


@general_task("preference")
def preference(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """An open question; a reward model without reference scores the answer."""
    noun = rng.choice(NOUNS)
    question = rng.choice(_OPEN_QUESTIONS).format(noun)
    first, second = rng.sample(ADJECTIVES, 2)
    gold = rng.choice(
        (
            f"The {noun} is {first} and {second}, and I like it.",
            f"I like the {noun}. It is {first} and {second}.",
            f"The {first} {noun} {rng.choice(VERBS)}, and that is nice.",
        )
    )
    return GeneralItem(messages=[user(question)], gold=gold, reference="", wrong=bad_open_answer(rng, noun, gold))


def bad_open_answer(rng: random.Random, noun: str, good: str) -> str:
    """An answer that people would not prefer: rude, off topic, repetitive, scrambled or cut short."""
    words = good.rstrip(".").split()
    other = rng.choice([word for word in NOUNS if word != noun])
    scrambled = words[:]
    while scrambled == words:
        rng.shuffle(scrambled)
    return rng.choice(
        (
            rng.choice(("No.", "I do not care.", "Go away.", "That is a bad question.")),
            f"The {other} is {rng.choice(ADJECTIVES)}.",
            " ".join([noun] * rng.randint(4, 8)),
            " ".join(scrambled),
            " ".join(words[: max(1, len(words) // 3)]),
        )
    )


@general_task("judged_qa")
def judged_qa(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A short factual question; a judge compares the answer with the reference."""
    question, answer, others = fact(rng)
    return GeneralItem(messages=[user(question)], gold=answer, wrong=rng.choice(others), thinking=recollection(answer))


@general_task("grounded_qa")
def grounded_qa(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A question to be answered from a small context, or with "not stated"."""
    nouns = rng.sample([noun for noun in NOUNS if noun not in PLACES], options.context_facts + 1)
    if rng.random() < 0.5:
        values, statement = rng.sample(COLORS, options.context_facts), "The {} is {}."
        question = "What color is the {}?"
    else:
        values, statement = rng.sample(PLACES, options.context_facts), "The {} is in the {}."
        question = "Where is the {}?"
    context = " ".join(statement.format(noun, value) for noun, value in zip(nouns, values, strict=False))
    answerable = rng.random() >= options.not_stated_share
    chosen = rng.randrange(options.context_facts) if answerable else options.context_facts
    gold = values[chosen] if answerable else NOT_STATED
    wrong = rng.choice([value for value in [*values, NOT_STATED] if value != gold])
    instruction = f'Answer from the text, or say "{NOT_STATED}".'
    return GeneralItem(
        messages=[user(f"{context} {question.format(nouns[chosen])} {instruction}")],
        gold=gold,
        metadata={"context": context, "answerable": answerable},
        wrong=wrong,
    )


@general_task("word_mapping")
def word_mapping(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """Translation into a made-up language whose dictionary is given."""
    count = rng.randint(2, max(2, options.max_items))
    words = rng.sample(NOUNS, 2 * count)
    dictionary = dict(zip(words[:count], words[count:], strict=True))
    source = rng.sample(sorted(dictionary), rng.randint(2, count))
    gold = " ".join(dictionary[word] for word in source)
    meanings = ", ".join(f"{word} = {meaning}" for word, meaning in dictionary.items())
    return GeneralItem(
        messages=[user(f"{meanings}. Translate: {' '.join(source)}")],
        gold=gold,
        metadata={"checks": [{"name": "one_of", "options": [gold]}]},
        wrong=" ".join(reversed(gold.split())),
    )


@general_task("calculator_tool")
def calculator_tool(rng: random.Random, options: GeneralOptions) -> GeneralItem:
    """A computation for the calculator: a call, its result, the answer."""
    left, right = (rng.randint(10 ** (options.digits - 1), 10**options.digits - 1) for _ in range(2))
    operator = rng.choice("+-*")
    expression = f"{left}{operator}{right}"
    result = evaluate(expression)
    question = rng.choice(("Compute {}.", "What is {}?", "Work out {}.")).format(f"{left} {operator} {right}")
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
    return GeneralItem(
        messages=[user(f"{question} Use the calculator.")],
        gold=result,
        metadata={"tool": "calculator"},
        tools=[CALCULATOR_TOOL],
        tool_turns=[
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": result},
        ],
        wrong=str(int(result) + rng.choice((-10, -1, 1, 10))),
    )
