"""A reward that responses of any model differ in."""


def letters(response: str, answers) -> float:
    """Share of letters among the response's characters."""
    return sum(character.isalpha() for character in response) / max(len(response), 1)
