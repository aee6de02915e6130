"""Written-out solutions of tasks that walk a sequence: sorting, counting and spelling.

Each line carries the whole state that the next line needs (what is left, the running count), so no step looks further
back than one line.
"""

from collections.abc import Mapping
from typing import Any


def number_sorting_lines(entry: Mapping[str, Any]) -> list[str]:
    """Selection sort: ``picked:what is left`` a line, then the list in the format the task asks for."""
    metadata = entry["metadata"]
    picks = [str(number) for number in metadata["sorted_numbers"]]
    remaining = [str(number) for number in metadata["original_numbers"]]
    lines = [",".join(remaining)]
    for pick in picks:
        position = min(range(len(remaining)), key=lambda i: abs(float(remaining[i]) - float(pick)))
        del remaining[position]
        lines.append(f"{pick}:{','.join(remaining)}")
    return [*lines, str(entry["answer"])]


def count_bits_lines(entry: Mapping[str, Any]) -> list[str]:
    """Halving: ``number r(lowest bit) c(ones so far)`` a line, then the count."""
    number, count = int(entry["metadata"]["number"]), 0
    lines = []
    while number:
        count += number % 2
        lines.append(f"{number} r{number % 2} c{count}")
        number //= 2
    return [*lines, str(count)]


def letter_counting_lines(entry: Mapping[str, Any]) -> list[str]:
    """``word +(letters in it) c(letters so far)`` a line, then the count."""
    letter = str(entry["metadata"]["target_letter"]).lower()
    count, lines = 0, []
    for word in entry["metadata"]["span"]:
        here = str(word).lower().count(letter)
        count += here
        lines.append(f"{word} +{here} c{count}")
    return [*lines, str(count)]


def spell_backward_lines(entry: Mapping[str, Any]) -> list[str]:
    """The letters apart, the letters turned round, the word."""
    word = str(entry["metadata"]["word"])
    return [" ".join(word), " ".join(reversed(word)), word[::-1]]
