"""What stands around a value without being part of it: units, percent and currency signs, degrees."""

from __future__ import annotations

import re

# Names of one unit, the first of which stands for all. One letter outside \text is a variable, not a unit.
SYNONYMS = """
    cm centimeter centimetre, m meter metre, km kilometer kilometre, mm millimeter millimetre, in inch inches, ft foot feet,
    yd yard, mi mile, g gram, kg kilogram, mg milligram, lb pound, s sec second, min minute, h hr hour, day, week, month,
    yr year, cent, dollar, degree deg, unit, Hz hertz, l liter litre, ml, percent percentage pct, mph, J joule, N newton,
    W watt, V volt, K kelvin, eV, Pa, mol, gal gallon
"""
CANONICAL = {name: names.split()[0] for names in SYNONYMS.split(",") for name in names.split()}
POWER = r"(?:\s*\^\s*\{?\s*(-?\d)\s*\}?)?"
IN_TEXT = re.compile(
    r"(?<=[\w})\]%\s~,;!])(?:\\?\s|~|\\,|\\;|\\!)*\\(text|mbox|textrm|mathrm)\s*\{([^{}]*)\}" + POWER + r"\s*$"
)
BARE = re.compile(r"(?<=[\d})])\s+([A-Za-z]{2,}(?: [A-Za-z]{2,})?)" + POWER + r"\s*$")
DEGREES = re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°)\s*(?:\\?\s*[CF])?\s*$")
SECONDS = re.compile(r"(?<=\d)\s*\^\s*\{\s*(\\prime\s*){1,2}\}\s*$")
PERCENT = re.compile(r"\s*\\?%\s*$")
DOLLAR = re.compile(r"^\s*\\\$")


def split_unit(text: str) -> tuple[str, str]:
    """``text`` without the unit around its value, and the unit in one spelling; "" where there is none."""
    units: list[str] = []
    while True:
        shorter, unit = _last_unit(text)
        if not unit or not shorter.strip():
            return text, " ".join(sorted(units))
        text = shorter
        units.append(unit)


def _last_unit(text: str) -> tuple[str, str]:
    for pattern, unit in ((DOLLAR, "dollar"), (PERCENT, "percent"), (DEGREES, "degree"), (SECONDS, "second of arc")):
        if match := pattern.search(text):
            return text[: match.start()] + text[match.end() :], unit
    if match := IN_TEXT.search(text):
        known = _canonical(match[2]) is not None
        if match[1] in ("text", "mbox", "textrm") and match[2].strip() not in ("", "and", "or") or known:
            return text[: match.start()], _named(match[2], match[3])
    if (match := BARE.search(text)) and _canonical(match[1]) is not None:
        return text[: match.start()], _named(match[1], match[2])
    return text, ""


def _named(words: str, power: str | None) -> str:
    unit = _canonical(words) or " ".join(words.split()).strip(".").lower()
    return unit + (power or "")


def _canonical(words: str) -> str | None:
    """``square inches`` as ``in2``; None where a word is no unit."""
    squared = len(words.split()) > 1 and words.split()[0] in ("square", "sq", "cubic")
    names = words.strip(" .").split()[squared:]
    units = [CANONICAL.get(name) or CANONICAL.get(name.removesuffix("s"), "") for name in names]
    if not units or "" in units:
        return None
    return " ".join(units) + ({"cubic": "3"}.get(words.split()[0], "2") if squared else "")
