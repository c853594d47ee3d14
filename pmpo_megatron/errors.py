"""The errors a user can cause or meet. Every message names the field, file, tensor or rank, and what would be right."""

from __future__ import annotations


class PmpoError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(PmpoError):
    """A configuration value is wrong, unknown or does not go together with another.

    Args:
        field: dotted name of the field, e.g. ``rollout.temperature``.
        problem: what is wrong with it, with the value seen, and what would be right.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def within(self, section: str) -> ConfigError:
        """The same error with ``section`` put in front of the field's name."""
        return ConfigError(f"{section}.{self.field}" if self.field else section, self.problem)


class DataError(PmpoError):
    """A data file holds something that cannot be used; the message gives file and line."""


class MappingError(PmpoError):
    """A checkpoint's tensors do not match the architecture: missing, extra or misshapen, by name."""


class CheckpointError(PmpoError):
    """A checkpoint is absent, damaged, or cannot be written; the message gives its path."""


class RolloutError(PmpoError):
    """The rollout engine failed to start, to answer in time, or answered nonsense."""


class WeightSyncError(PmpoError):
    """The rollout engine does not hold the weights that the trainer sent; names tensor and rank."""


class NonFiniteError(PmpoError):
    """NaN or inf where a number belongs; names the trajectory or parameter."""


class RankFailure(PmpoError):
    """Another rank died or does not answer; names it."""


class MismatchError(PmpoError):
    """Trainer and rollout engine assign the same tokens log-probs too far apart."""
