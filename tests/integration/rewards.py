"""Rewards that a random model's responses differ in, and one that waits."""

import asyncio
from pathlib import Path

OTHERS = [asyncio.Event() for _ in range(6)]  # calls of `all_at_once`


def letters(response: str, answers) -> float:
    """Share of letters among the characters."""
    return sum(character.isalpha() for character in response) / max(len(response), 1)


def shorter(responses, answers, metadata) -> list[float]:
    """How much shorter each response of a group is than the longest, in the unit of its row."""
    return [(max(map(len, responses)) - len(response)) / metadata["unit"] for response in responses]


async def all_at_once(response, answers, metadata) -> float:
    """The number in the response: 0 and 1 wait for a file, and each of 2 to 7 for the other five to be asked for."""
    number = int(response)
    while number < 2 and not Path(metadata["go"]).exists():
        await asyncio.sleep(0.01)
    if number >= 2:
        OTHERS[number - 2].set()
        await asyncio.gather(*(other.wait() for other in OTHERS))
    return float(number)
