"""What a run records and shows."""

from __future__ import annotations

from dataclasses import dataclass

from pmpo_megatron.config import Section, setting


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Section):
    """What a run records and shows. Metrics always go to ``metrics.jsonl`` in the run's directory."""

    progress: str = setting(
        "auto",
        "what the terminal shows: a live table, one line for every step, or nothing; auto: the table where it can be drawn",
        choices=("auto", "rich", "line", "off"),
    )
    tensorboard: bool = setting(True, "also write TensorBoard events to <run directory>/tensorboard")
    wandb_project: str | None = setting(None, "also log to this Weights & Biases project; needs `pip install wandb`")
    rollout_samples: int = setting(4, "responses of every round saved to rollouts.jsonl, for people to read", minimum=0)
    token_examples: int = setting(
        3, "trajectories of a round saved token by token to tokens.jsonl, with each token's share of the gradient", minimum=0
    )
    trajectories: bool = setting(True, "save p, ESS, clip fraction, length and reward of every trajectory, for plots")
    report: bool = setting(True, "write report.html at the end of the run")
