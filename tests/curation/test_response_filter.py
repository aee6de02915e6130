import pytest

from qwen3_lit.curation.response_filter import (
    ResponseFilterConfig,
    check_agreement,
    check_form,
    check_guessing,
    check_language,
    check_repetition,
    check_response,
    repeated_share,
)
from qwen3_lit.errors import UserError

CONFIG = ResponseFilterConfig()
STEPS = "47+38\n7+8+0=15\n4+3+1=08\n85"


def test_sound_response_passes() -> None:
    assert check_response("What is 47 + 38?", STEPS, "85", CONFIG, 20) is None
    assert check_response("What is 47 + 38?", STEPS, "The answer is \\boxed{85}.", CONFIG, 20) is None


@pytest.mark.parametrize(
    ("thinking", "answer"), [("", "85"), (STEPS, " "), (STEPS + "\n<|im_end|>", "85"), (STEPS, "<think>\n\n</think>85")]
)
def test_form(thinking: str, answer: str) -> None:
    assert check_form(thinking, answer) == "malformed"


def test_repetition() -> None:
    loop = "Wait, let me check the sum again and see. "
    assert check_repetition(STEPS + "\n" + loop * 8, "85", CONFIG) == "repetition"
    assert check_repetition(STEPS, "85\n" * 6, CONFIG) == "repetition"
    assert check_repetition(STEPS + "\n" + loop * 2, "85", CONFIG) is None
    assert check_repetition("111+111\n" + "1+1+0=02\n" * 3 + "222", "222", CONFIG) is None
    assert repeated_share("a b c d e f " * 3, 6, 4) == 0.0


@pytest.mark.parametrize(
    ("thinking", "answer", "reason"),
    [
        (STEPS, "86", "disagreement"),
        (STEPS, "85.0", None),
        ("so the answer is 85", "\\boxed{85}", None),
        ("we get ['1', '2']", "['1', '2']", None),
        ("x\n['2', '1']", "['1', '2']", "disagreement"),
        ("it is neither of the two things we looked at", "Paris is the capital", None),
    ],
)
def test_agreement(thinking: str, answer: str, reason: str | None) -> None:
    assert check_agreement(thinking, answer) == reason


@pytest.mark.parametrize("thinking", ["I guess it is 85.", "It is probably 85.", "Not sure, maybe 85.", "85"])
def test_guessing(thinking: str) -> None:
    assert check_guessing(thinking, "85", CONFIG) == "guessing"


def test_guessing_by_length_and_by_missing_answer() -> None:
    assert check_guessing("40+45 so 85", "85", CONFIG, sibling_median_words=100) == "guessing"
    assert check_guessing("40+45 so 85", "85", CONFIG, sibling_median_words=12) is None
    assert check_guessing("we look at the long list of numbers", "85", CONFIG) == "guessing"
    long = "First the units are added, then the tens. " * 10 + "Maybe check: yes.\n85"
    assert check_guessing(long, "85", CONFIG) is None


@pytest.mark.parametrize(
    ("query", "thinking", "reason"),
    [
        ("What is 47 + 38?", STEPS + "\n所以", "language_mixing"),
        ("What is 47 + 38?", "First the units, затем the tens.", "language_mixing"),
        ("What is the angle?", "Let the angle be α and β, then α = β.", None),
        ("四十七加三十八是多少?", "七加八等于十五, 进一. x + y", None),
        ("四十七加三十八是多少?", "First we add the units and then we add the tens", "language_mixing"),
        ("東京の人口は?", "とうきょうの人口を考える", None),
        ("5 + 5 =", "five and five", None),
        ("What is 2 * 2^n?", "2 · 2ⁿ = 2ⁿ⁺¹, so 2ⁿ⁺¹", None),
        ("Solve x.", "x ∈ ℝ, n ∈ ℕ, z ∈ ℤ, 𝑥 = 𝛼", None),
        ("How heavy is it?", "It is 5 µg, or 5 μg.", None),
        ("東京の人口は?", "ﾄｳｷｮｳの人口を考える", None),
        ("四十七加三十八是多少?", "我们有 x ∈ ℝ 和 2ⁿ", None),
        ("What is 47 + 38?", "First the units, 𝑥 затем the tens.", "language_mixing"),
        ("四十七加三十八是多少?", "Ｆｉｒｓｔ we add the units and then the tens", "language_mixing"),
    ],
)
def test_language(query: str, thinking: str, reason: str | None) -> None:
    assert check_language(query, thinking, "85", CONFIG) == reason


def test_config_is_checked() -> None:
    with pytest.raises(UserError, match="max_foreign_share=2"):
        ResponseFilterConfig(max_foreign_share=2)
