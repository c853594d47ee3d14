"""Where a response's final answer is. Linear time, whatever the text."""

from __future__ import annotations

import re

# Every step of the scan: a box's opening (also with the backslash doubled, as in JSON), an escaped character, a brace.
MARK = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# A sign belongs to the number unless something is in front of it to subtract from: "3-5" ends in 5.
NUMBER = re.compile(r"(?:(?<![\w.)\]}%])[-+])?(?:\d[\d,]*(?:\.\d+)?|(?<!\d)\.\d+)(?:/\d+)?")
TAIL = 4000  # characters of a long response in which a final number without a box is looked for
LONGEST_ANSWER = 2000  # characters: whatever is longer is no answer


def boxed_answers(response: str) -> list[str]:
    r"""Contents of every complete ``\boxed{...}``, braces nested, in order; an inner box belongs to the outer one."""
    found: list[tuple[int, int]] = []
    open_braces: list[int | None] = []  # where each one's content begins if it is a box's
    for mark in MARK.finditer(response):
        text = mark.group()
        if text == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and mark.start() - start < LONGEST_ANSWER:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, mark.start()))
        elif text[-1] == "{" and text != r"\{":
            open_braces.append(mark.end() if len(text) > 1 else None)
    return [response[start:end].strip() for start, end in found]


def extract_answer(response: str) -> str | None:
    """The final answer: the last box; without any, the last number of the text's end; None where there is neither."""
    boxes = boxed_answers(response)
    if boxes:
        return boxes[-1]
    numbers = NUMBER.findall(response[-TAIL:])
    return numbers[-1].rstrip(",") if numbers else None
