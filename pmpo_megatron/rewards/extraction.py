"""Where a response's final answer is. Linear time, whatever the text."""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
TAIL = 4000  # characters of a long response in which a final number without a box is looked for
LONGEST_ANSWER = 2000  # characters: whatever is longer is no answer


def boxed_answers(response: str) -> list[str]:
    r"""Contents of every complete ``\boxed{...}``, braces nested, in order; an inner box belongs to the outer one."""
    answers, position = [], 0
    while match := BOX.search(response, position):
        end = _closing_brace(response, match.end())
        if end is None:
            position = match.end()  # never closed within a sensible length: what follows may still hold a whole box
            continue
        answers.append(response[match.end() : end].strip())
        position = end + 1
    return answers


def extract_answer(response: str) -> str | None:
    """The final answer: the last box; without any, the last number of the text's end; None where there is neither."""
    boxes = boxed_answers(response)
    if boxes:
        return boxes[-1]
    numbers = NUMBER.findall(response[-TAIL:])
    return numbers[-1].rstrip(",") if numbers else None


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before ``start``, looking at most LONGEST_ANSWER characters ahead."""
    depth, escaped = 1, False
    for index in range(start, min(len(text), start + LONGEST_ANSWER)):
        character = text[index]
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return index
    return None
