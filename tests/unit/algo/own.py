"""Rules and an advantage as a reader may write them, for the tests."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from pmpo_megatron.algo.advantages import Advantage
from pmpo_megatron.algo.rules import P_LIMIT, Rule
from pmpo_megatron.config import setting


@dataclass(frozen=True, kw_only=True)
class Tabulated(Rule):
    """Rule fixed without saying beforehand what p is, so that the table of all orders must give what the plain sums give."""

    p: float = setting(help="the order", minimum=-P_LIMIT, maximum=P_LIMIT)

    def p_range(self):
        return self.p, self.p

    def choose(self, sums, clip_fraction_N):
        return torch.full_like(clip_fraction_N, self.p), None


@dataclass(frozen=True, kw_only=True)
class Demanding(Tabulated):
    """Asks for a statistic that there is not."""

    p: float = setting(1.0)
    group_statistics: ClassVar[tuple[str, ...]] = ("reward_median",)


@dataclass(frozen=True, kw_only=True)
class Shapeless(Advantage):
    """Whatever it is told to give."""

    size: int = setting(1)

    def of_group(self, rewards_G):
        return np.full(self.size, np.nan if self.size == rewards_G.size else 1.0)
