"""A reward that a random model's responses differ in."""


def letters(response: str, answers) -> float:
    """Share of letters among the characters."""
    return sum(character.isalpha() for character in response) / max(len(response), 1)
