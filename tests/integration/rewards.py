"""A reward that a random model's responses differ in."""


def letters(response: str, answers) -> float:
    """Share of letters among the characters."""
    return sum(character.isalpha() for character in response) / max(len(response), 1)


def shorter(responses, answers, metadata) -> list[float]:
    """How much shorter each response of a group is than the longest, in the unit of its row."""
    return [(max(map(len, responses)) - len(response)) / metadata["unit"] for response in responses]
