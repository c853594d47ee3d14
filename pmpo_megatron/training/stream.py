"""Rollouts that never wait: prompts are always in flight, weights change under them, and a round takes what is finished."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rewards import ScoredGroup, score_groups
from pmpo_megatron.training.collector import POLL_S, Collector, RoundBatch
from pmpo_megatron.types import RolloutGroup


@dataclass
class _Draw:
    """A prompt that the sampler gave and that no round was trained on yet."""

    number: int  # of the draw; also of its seeds
    prompt_index: int
    version: int = 0  # of the engine when it was submitted
    future: Future[RolloutGroup] | None = None
    scored: ScoredGroup | None = None

    @property
    def oldest(self) -> int:
        """The oldest version that made, or may have made, one of its tokens."""
        if self.scored is None:
            return self.version
        return min(rollout.policy_version for rollout in self.scored.group.rollouts)


class StreamCollector(Collector):
    """As `Collector`, for mode in_flight. Every method is called by one thread; another scores, all that is finished at once.

    So many prompts are open, submitted and not trained on, that none is older than ``max_staleness`` where all take equally
    long. One that is too old for the next round, finished or not, is submitted again with the newest weights, and counted.

    Args:
        rounds: of the run: no more prompts are drawn than they take.
        versions_per_round: updates of the policy in a round.
        drawn, open: `progress.RunProgress` of the checkpoint; its open prompts are submitted before any other.
    """

    def __init__(
        self, *, rounds: int, versions_per_round: int, drawn: int, open: Sequence[Sequence[int]], **parts: Any
    ) -> None:
        super().__init__(**parts)
        self._rounds, self._drawn = rounds, drawn
        self._rounds_ahead = self.round.max_staleness // versions_per_round
        self._open = {number: _Draw(number, index) for number, index in open}
        self._finished: deque[tuple[_Draw, Future[RolloutGroup]]] = deque()  # and not scored
        self._news = threading.Condition()
        self._error: BaseException | None = None

    def collect(self, round_index: int, *, stop: Callable[[], bool]) -> RoundBatch | None:
        started, wanted = time.monotonic(), self.batch.prompts_per_round
        counted = {"rollout/stale_finished": 0.0, "rollout/stale_running": 0.0, "rollout/uninformative": 0.0}
        with self._news:
            while True:
                if self._error is not None:
                    raise RolloutError(str(self._error)) from self._error
                self._give_back_stale(counted)
                self._leave_out_uninformative(counted)
                self._fill(round_index)
                ready = [draw for draw in self._open.values() if draw.scored is not None][:wanted]
                if len(ready) == wanted:
                    break
                if stop():
                    return None
                self._news.wait(POLL_S)
            for draw in ready:
                del self._open[draw.number]
            still_open = tuple((draw.number, draw.prompt_index) for draw in self._open.values())
            counted["rollout/groups_generated"] = wanted + counted["rollout/uninformative"] + counted["rollout/stale_finished"]
            batch = self._batch(
                [draw.scored for draw in ready if draw.scored is not None], counted, started, drawn=self._drawn, open=still_open
            )  # before more are drawn
            self._fill(round_index + 1)
            return batch

    def _give_back_stale(self, counted: dict[str, float]) -> None:
        """What still runs is given back, too: its first tokens do not become younger."""
        for draw in self._open.values():
            if draw.future is None or self.engine.version - draw.oldest <= self.round.max_staleness:
                continue
            if draw.scored is None and not draw.future.cancel():
                continue  # it has just finished, and is being scored
            counted["rollout/stale_running" if draw.scored is None else "rollout/stale_finished"] += 1
            draw.future = draw.scored = None

    def _leave_out_uninformative(self, counted: dict[str, float]) -> None:
        """Dynamic sampling: groups of equal rewards give their place to further prompts, up to so many in a round."""
        most = self.round.dynamic_sampling_attempts * self.batch.prompts_per_round if self.round.dynamic_sampling else 0
        for draw in list(self._open.values()):
            if counted["rollout/uninformative"] < most and draw.scored is not None and not draw.scored.informative:
                del self._open[draw.number]
                counted["rollout/uninformative"] += 1

    def _fill(self, round_index: int) -> None:
        """Draws as many prompts as may be open, and submits what is open and not under way."""
        rounds = min(self._rounds_ahead, self._rounds - round_index)
        missing = max(0, rounds * self.batch.prompts_per_round - len(self._open))
        for index in self.sampler.next(missing):
            self._open[self._drawn] = _Draw(self._drawn, index)
            self._drawn += 1
        for draw in self._open.values():
            if draw.future is None:
                self._submit(draw)

    def _submit(self, draw: _Draw) -> None:
        draw.version = self.engine.version
        [draw.future] = self.engine.submit([self.prompts[draw.prompt_index]], self.sampling, round_index=draw.number)
        draw.future.add_done_callback(lambda future: self._finish(draw, future))

    def _finish(self, draw: _Draw, future: Future[RolloutGroup]) -> None:
        """Called by the engine's thread; leaves the work to this collector's own."""
        if not future.cancelled():
            self._finished.append((draw, future))
            try:
                self._thread.submit(self._score)
            except RuntimeError:
                pass  # closed: nobody waits any more

    def _score(self) -> None:
        """What has finished since the last call, side by side: the calls of an async reward are of all groups."""
        finished = [self._finished.popleft() for _ in range(len(self._finished))]
        try:
            scored = score_groups([future.result() for _, future in finished], self.scorer)
        except Exception as error:
            self._error = error
        else:
            for (draw, _), group in zip(finished, scored, strict=True):
                draw.scored = group
        with self._news:
            self._news.notify()
