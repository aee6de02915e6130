"""Rule reward against invention: the answer must be in the given context, or say that it is not stated there.

What an answer says beyond the question and the reference costs in proportion, as in the precision of SQuAD's token F1,
also when the context has it: an answer that copies the whole context holds every reference and answers no question.
"""

import re

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.reward import Reward, RewardInput

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
# Words that carry no claim, so an answer may use them whether or not the context does.
_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        """a about according after all also am an and any are as at be because been before being but by can context
    could did do does for from given had has have he her here his how i if in into is it its itself me my no nor not
    of on or our out passage said says she so some stated such text than that the their them then there these they
    this those to too under up was we were what when where which while who whom whose why will with
    would you your answer yes thus therefore question mentioned mention provided information states tells"""
    )
)


def words(text: str) -> list[str]:
    """Lower-cased words and numbers of a text."""
    return _WORD.findall(text.lower())


_NEGATIONS = frozenset(("not", "never", "cannot", "neither", "nor"))


def states(text: str, phrase: str) -> bool:
    """Whether the words of `phrase` stand in `text` one after the other and not right behind a negation.

    Case and punctuation aside.
    """
    said, wanted = words(text), words(phrase)
    for start in range(len(said) - len(wanted) + 1):
        before = said[start - 1] if start else ""
        if said[start : start + len(wanted)] == wanted and before not in _NEGATIONS and not before.endswith("n't"):
            return bool(wanted)
    return False


def without_words(text: str, passage: str) -> str:
    """The words of `text` without those of `passage` where they stand one after the other, spacing aside."""
    cut = " ".join(words(passage))
    return f" {' '.join(words(text))} ".replace(f" {cut} ", " ") if cut else text


def unsupported_fraction(answer: str, *sources: str) -> float:
    """Share of the answer's content words that occur in none of the sources; 0 for an answer without any."""
    known = {word for source in sources for word in words(source)}
    content = [word for word in words(answer) if word not in _FUNCTION_WORDS]
    return sum(word not in known for word in content) / len(content) if content else 0.0


class GroundedReward(Reward):
    """1 for a right answer, or an honest "not stated", that says no more; less for words nobody asked for, 0 if wrong.

    Reads `metadata.context` and optionally `metadata.answerable` (default: the reference is not `not_stated`).
    Not applicable to problems without a context.

    Args:
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
        not_stated: What an answer has to contain when the context does not hold the fact.
        unsupported_penalty: Share of the score lost when no content word of the answer is in reference or question.
    """

    default_name = "grounded"
    measures_accuracy = True

    def __init__(
        self,
        weight: float = 1.0,
        tasks: list[str] | None = None,
        name: str | None = None,
        not_stated: str = "not stated",
        unsupported_penalty: float = 1.0,
    ) -> None:
        super().__init__(weight, tasks, name)
        if not 0 <= unsupported_penalty <= 1:
            raise UserError(f"GroundedReward: unsupported_penalty: {unsupported_penalty} is outside [0, 1]")
        self.not_stated = not_stated
        self.unsupported_penalty = unsupported_penalty

    def applies(self, item: RewardInput) -> bool:
        return super().applies(item) and bool(item.metadata.get("context"))

    def score(self, item: RewardInput) -> float:
        says_not_stated = states(item.answer, self.not_stated)
        answerable = item.metadata.get("answerable", not states(item.reference, self.not_stated))
        right = not says_not_stated and states(item.answer, item.reference) if answerable else says_not_stated
        if not right:
            return 0.0
        asked = " ".join(str(message.get("content", "")) for message in item.messages)
        question = without_words(asked, str(item.metadata["context"]))
        return 1.0 - self.unsupported_penalty * unsupported_fraction(
            item.answer, item.reference, question, self.not_stated
        )
