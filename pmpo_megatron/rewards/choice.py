"""Multiple choice: which one of the options a response settles on (docs/rewards.md, "Choices")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pmpo_megatron.rewards.extraction import boxed_answers

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DEFAULT_LETTERS = 10  # MMLU-Pro's, where the row does not list its options
# What leads to an answer in words; what follows up to the line's end is the statement.
STATEMENT = re.compile(
    r"\b(?:final answer|correct answer|right answer|best answer|answer|correct option|correct choice|correct letter)\s*"
    r"(?:is|was|would be|should be|must be|[:=])\s*:?(.*)",
    re.IGNORECASE,
)
# One letter with what people put around it: (A), **A**, A., option A, \text{A}, A) with the option's text behind it.
LETTER = re.compile(r"(?:(?:the )?(?:option|choice|letter|answer)\s+)?[\[({]?([A-Za-z])[\])}]?(?:[.:)]+)?", re.IGNORECASE)
LABELLED = re.compile(r"[\[({]?([A-Z])(?:[\])}]+[.:]?|[.:])\s+(.+)", re.DOTALL)
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm|mbox)\s*\{([^{}]*)\}")
LONGEST_STATEMENT = 500  # characters


def chosen_option(response: str, options: Sequence[str] = ()) -> str | None:
    """The letter of the option that ``response`` settles on; None for none, or for more than one.

    A box decides if there is one, else the statements of the form "the answer is". All boxes, or all statements, must agree.

    Args:
        options: texts of the options A, B, ...; without them only letters are understood, of the first ten.
    """
    boxes = boxed_answers(response)
    claims = boxes or [_sentence(match) for match in STATEMENT.findall(response)]
    chosen = {_option_of(claim, options) for claim in claims}
    return chosen.pop() if len(chosen) == 1 else None


def choice(response: str, answers: Sequence[str], metadata: Mapping[str, Any]) -> float:
    """1.0 if the response settles on one option, and it is the accepted one; else 0.0.

    ``answers`` holds the option's letter, its number from 0 (as a text), or its text. ``metadata`` may hold the options'
    texts as ``options`` or ``choices``: a list, or ARC's {"text": [...], "label": [...]}.

    Raises:
        ValueError: the row's options are of another form, or the answer is none of them.
    """
    options = _options(metadata)
    accepted = {_accepted(answer, options) for answer in answers}
    return float(chosen_option(response, options) in accepted)


def _options(metadata: Mapping[str, Any]) -> list[str]:
    options = metadata.get("options", metadata.get("choices", metadata.get("endings", [])))
    if isinstance(options, Mapping):
        options = options.get("text")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options) or len(options) > len(LETTERS):
        raise ValueError(f"metadata: options are a list of at most {len(LETTERS)} texts")
    return options


def _accepted(answer: str, options: Sequence[str]) -> str:
    known = LETTERS[: len(options) or DEFAULT_LETTERS]
    text = answer.strip()
    if len(text) == 1 and text.upper() in known:
        return text.upper()
    matching = [letter for letter, option in zip(LETTERS, options, strict=False) if _plain(option) == _plain(text)]
    if len(matching) == 1:
        return matching[0]
    if text.isdigit() and int(text) < len(known):
        return known[int(text)]
    raise ValueError(f"the accepted answer {answer!r} is no letter of {known} and none of the options")


def _sentence(text: str) -> str:
    """The statement without what follows its first sentence."""
    return re.split(r"(?<=[\w)\]}*\"'])[.!?](?:\s|$)(?!\s*\S{0,2}$)", text[:LONGEST_STATEMENT].strip(), maxsplit=1)[0]


def _option_of(claim: str, options: Sequence[str]) -> str | None:
    """The one option that ``claim`` names, by letter, by text, or by both if they agree."""
    known = LETTERS[: len(options) or DEFAULT_LETTERS]
    text = _bare(claim)
    named = {letter for letter, option in zip(LETTERS, options, strict=False) if _plain(option) == _plain(text)}
    if (match := LETTER.fullmatch(text)) and match[1].upper() in known and match[1] != "i":
        named.add(match[1].upper())
    if named:
        return named.pop() if len(named) == 1 else None
    if (match := LABELLED.fullmatch(text)) and match[1] in known:
        if not options:
            return match[1] if not re.search(r"\b[A-J]\b", match[2]) else None
        return match[1] if _plain(match[2]) == _plain(options[LETTERS.index(match[1])]) else None
    return None


def _bare(text: str) -> str:
    """``text`` without markup, quotes and a final point."""
    while (inner := WRAPPED.sub(r"\1", text)) != text:
        text = inner
    text = re.sub(r"[*_`$\"'“”‘’]|\\[,;! ()\[\]]", " ", text)
    return " ".join(text.split()).strip(" :.,;!")


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[*_`$\"'“”‘’.]", " ", text).casefold().split())
