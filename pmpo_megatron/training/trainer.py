"""A run, as its pipeline: rollouts, old log-probs, optimizer steps on the objective, new weights into the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pmpo_megatron.algo.rejection import Rejection
from pmpo_megatron.bridge.source import give_back_cache
from pmpo_megatron.bridge.sync import WeightBridge
from pmpo_megatron.checkpoint.store import CheckpointStore
from pmpo_megatron.config import convert, field_types
from pmpo_megatron.errors import CheckpointError, ConfigError
from pmpo_megatron.model.micro_batch import MicroBatch, ScoredMicroBatch
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.model.step_results import StepResult
from pmpo_megatron.monitor import Maximum, Mean, Metric, PhaseTimer, RunLog
from pmpo_megatron.parallel.collectives import any_rank, broadcast_object
from pmpo_megatron.parallel.liveness import doing
from pmpo_megatron.parallel.stand_by import StandBy
from pmpo_megatron.training.collector import Collector, RoundBatch
from pmpo_megatron.training.guards import check_mismatch, check_step, dump_step
from pmpo_megatron.training.held_out import Evaluator
from pmpo_megatron.training.round_metrics import measure_mismatch, step_metrics, trajectory_record
from pmpo_megatron.training.routes import measure_routing, replayed_routes
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.training.shares import share_round
from pmpo_megatron.training.sources import objective_metrics
from pmpo_megatron.training.token_examples import token_examples
from pmpo_megatron.types import TrajectoryTable

logger = logging.getLogger(__name__)


@dataclass
class RunProgress:
    """Where a run stands: what a checkpoint holds beside the weights, the optimizer and the random states."""

    round: int = 0  # the next round
    policy_version: int = 0  # of the weights: counts rounds, or optimizer steps where each gives the engine new weights
    skipped_in_a_row: int = 0  # optimizer steps
    evaluated: int = -1  # the last round that was evaluated before
    sampler: dict[str, Any] = field(default_factory=dict)
    drawn: int = 0  # prompts that the sampler has given
    open: tuple[tuple[int, ...], ...] = ()  # of them, not trained on yet: the number of the draw, the prompt's index
    log: dict[str, Any] | None = None  # RunLog.cursor()
    accuracy: dict[str, float] = field(default_factory=dict)  # held-out, by round; keys are text, as JSON has them

    @staticmethod
    def of(values: dict[str, Any]) -> RunProgress:
        """What a checkpoint holds.

        Raises:
            CheckpointError: it is not the progress of a run; names the value.
        """
        hints = field_types(RunProgress)
        required = {"round", "policy_version", "sampler", "log"}
        if absent := sorted(required - values.keys()):
            raise CheckpointError(f"progress.json: damaged: {', '.join(absent)} is missing")
        if unknown := sorted(values.keys() - hints.keys()):
            raise CheckpointError(f"progress.json: {', '.join(unknown)}: unknown; written by another version?")
        try:
            found = RunProgress(**{name: convert(value, hints[name], name) for name, value in values.items()})
            convert([*found.accuracy.values()], tuple[float, ...], "accuracy")
            _check_places(found)
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"progress.json: damaged: {error}") from None
        return found


def _check_places(progress: RunProgress) -> None:
    """Raises where the positions that a run goes on from are not whole numbers of at least 0."""
    log, sampler = progress.log or {"step": 0, "bytes": {}}, progress.sampler
    places = {f"log.bytes.{name}": size for name, size in log["bytes"].items()} | {"log.step": log["step"]}
    places |= {f"sampler.{name}": sampler[name] for name in ("num_prompts", "seed", "epoch", "position") if sampler}
    places |= {"round": progress.round, "policy_version": progress.policy_version, "skipped": progress.skipped_in_a_row}
    places |= {f"accuracy of round {name}": int(name) for name in progress.accuracy} | {"drawn": progress.drawn}
    places |= {f"open[{n}][{k}]": value for n, draw in enumerate(progress.open) for k, value in enumerate(draw)}
    for name, value in places.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}")


class Trainer:
    """Runs rounds. Every rank has one; what only rank 0 owns (collector, evaluator, log) is None elsewhere."""

    def __init__(
        self,
        config: RunConfig,
        *,
        policy: Policy,
        reference: Policy | None,
        stand_by: StandBy,
        bridge: WeightBridge,
        store: CheckpointStore,
        collector: Collector | None,
        evaluator: Evaluator | None,
        log: RunLog | None,
        progress: RunProgress,
        stop: Callable[[], bool],
    ) -> None:
        self.config, self.policy, self.reference = config, policy, reference
        self.stand_by, self.bridge, self.store = stand_by, bridge, store
        self.collector, self.evaluator, self.log, self.progress, self.stop = collector, evaluator, log, progress, stop
        self.state, self.temperature = policy.state, config.sampling.temperature
        self.routes = replayed_routes(config, policy.shape)
        self.timer = PhaseTimer()
        self.pushed: int | None = None

    def run(self) -> bool:
        """Rounds until the configured number or until someone asks to stop; saved either way. True if all were run."""
        while self.progress.round < self.config.run.rounds:
            doing(f"round {self.progress.round}")
            batch, table = self.collect()
            if table is None or self.train_round(batch, table):
                break
        finished = self.progress.round >= self.config.run.rounds
        if finished:
            self.push_weights()
            self.evaluate()
        self.save(required=True)
        return finished

    def train_round(self, batch: RoundBatch | None, table: TrajectoryTable) -> bool:
        """One round on ``batch``, which only rank 0 has; True if the run should stop."""
        with self.timer.phase("rollouts"):
            samples = () if batch is None else batch.samples
            steps = share_round(samples, table, self.config, self.state, round_index=self.progress.round, routes=self.routes)
        with self.timer.phase("old_log_probs"):
            scored = [self.score(step) for step in steps]
        measured = measure_mismatch(scored, self.config.objective.log_bounds, self.state)
        mismatch = check_mismatch(measured, self.config.guards, self.progress.round, self.state)
        load = measure_routing(scored, self.policy)
        trained = self.progress.policy_version
        results = []
        for index, step in enumerate(scored):
            with self.timer.phase("train"):
                results.append(self.step(index, step))
            if self.config.versions_per_round > 1:
                self.progress.policy_version += 1
                self.push_weights()
        if self.progress.policy_version == trained:
            self.progress.policy_version += 1
        tokens = self.token_examples(scored[-1], results[-1], batch, table)
        self.progress.round += 1
        self.record(batch, results, mismatch | load.metrics, load.tokens, tokens, trained)
        self.store.poll()
        if self.store.due(self.progress.round):
            self.save()
        return any_rank(self.stop(), self.state)

    def collect(self) -> tuple[RoundBatch | None, TrajectoryTable | None]:
        """The round's batch on rank 0, and on every rank its table: None if someone asked to stop before it was complete.

        Overlapped: the batch was generated while the round before trained, so its policy is one round older; now the
        engine is idle, gets the newest weights, and begins with the next round's. In flight the engine gets them while it
        generates, and goes on.
        """
        overlapped = self.config.round.mode == "overlapped"
        ahead = overlapped and self.pushed is not None
        if not ahead:
            self.push_weights()
            self.evaluate()
        with self.timer.phase("rollouts"):
            give_back_cache(self.state.device)
            batch = self.stand_by.run(self._collect_here)
            if self.collector is not None and batch is not None and self.config.rollout.sleep != "none":
                self.collector.engine.sleep()
            table = broadcast_object(None if batch is None else batch.table, self.state)
        if table is None:
            return None, None
        if ahead:
            self.push_weights()
            self.evaluate()
        further = self.progress.round + 1 < self.config.run.rounds
        if overlapped and further and self.collector is not None:
            self.collector.start(self.progress.round + 1)
        return batch, table

    def _collect_here(self) -> RoundBatch | None:
        assert self.collector is not None, "rank 0 alone has one, and is asked alone"
        return self.collector.collect(self.progress.round, stop=self.stop)

    def score(self, micro_batches: list[MicroBatch]) -> list[ScoredMicroBatch]:
        """What an optimizer step takes: log-probs before the round's first update, and which tokens count."""
        config = self.config.round
        return score(
            self.policy,
            micro_batches,
            temperature=self.temperature,
            reference=self.reference,
            recompute=config.old_log_probs == "recomputed",
            rejection=Rejection(config.rejection, config.rejection_low, config.rejection_high),
            replay=config.routing_replay != "off",
        )

    def step(self, index: int, micro_batches: list[ScoredMicroBatch]) -> StepResult:
        """One optimizer step; a non-finite one is skipped, counted and written to disk, and too many in a row end the run."""
        result = optimizer_step(
            self.policy,
            micro_batches,
            objective=self.config.objective,
            progress=self.progress.round / self.config.run.rounds,
            temperature=self.temperature,
        )
        self.progress.skipped_in_a_row = 0 if result.applied else self.progress.skipped_in_a_row + 1
        if not result.applied:
            name = f"round-{self.progress.round:08d}-step-{index:03d}"
            dump_step(Path(self.config.run.directory) / "skipped", name, micro_batches, result, self.state)
            check_step(result, self.progress.skipped_in_a_row, self.config.guards, name, self.state)
        return result

    def push_weights(self) -> None:
        """The policy's weights into the engine; nothing to do where it has them."""
        if self.pushed == self.progress.policy_version:
            return
        with self.timer.phase("push_weights"):
            self.bridge.push(self.progress.policy_version)
        self.pushed = self.progress.policy_version

    def evaluate(self) -> None:
        """Held-out accuracy with the weights that the engine holds, where one is due before this round."""
        done, last, config = self.progress.round, self.config.run.rounds, self.config.evaluation
        if config.data is None or done == self.progress.evaluated or (done % config.every_rounds and done != last):
            return
        self.progress.evaluated = done
        with self.timer.phase("evaluation"):
            give_back_cache(self.state.device)
            metrics = self.stand_by.run(lambda: self.evaluator.evaluate(done) if self.evaluator is not None else None)
        if self.log is not None and metrics is not None:
            self.progress.accuracy[str(done)] = self.log.log(done, metrics)["eval/accuracy_mean"]

    def token_examples(
        self, step: list[ScoredMicroBatch], result: StepResult, batch: RoundBatch | None, table: TrajectoryTable
    ) -> list[dict[str, Any]]:
        """Some trajectories of the round's last step token by token, on rank 0."""
        decode = None if self.collector is None else self.collector.prompts.decode
        done = self.progress.round
        return token_examples(self.policy, step, result, batch, table, self.config, round_index=done, decode=decode)

    def record(
        self,
        batch: RoundBatch | None,
        results: list[StepResult],
        measured: dict[str, Metric],
        expert_tokens: dict[str, list[int]],
        tokens: list[dict[str, Any]],
        trained: int,
    ) -> None:
        """Where the finished round leaves the sampler, and its metrics, on rank 0; ``trained``: the version it began with."""
        times = self.timer.take()
        if batch is None or self.log is None:
            return
        self.progress.sampler, self.progress.drawn, self.progress.open = batch.sampler_state, batch.drawn, batch.open
        metrics = batch.metrics | step_metrics(results) | objective_metrics(results, batch.sources) | measured | times
        metrics["throughput/tokens_per_s"] = int(batch.table.lengths_N.sum()) / times["time/total_s"]
        staleness = trained - batch.versions
        metrics |= {"rollout/staleness": Mean.of(staleness), "rollout/staleness_max": Maximum(float(staleness.max()))}
        record = trajectory_record(results, batch.table.rewards_N)
        updates = {"updates/grad_norm": [result.grad_norm for result in results if result.applied]}
        self.log.log(
            self.progress.round,
            metrics,
            updates=updates,
            trajectories=record,
            rollouts=batch.examples,
            tokens=tokens,
            experts=expert_tokens,
        )

    def save(self, *, required: bool = False) -> None:
        """Everything that the run needs to go on exactly from here."""
        with self.timer.phase("checkpoint"):
            if self.log is not None:
                self.progress.log = self.log.cursor()
            accuracy = {int(done): value for done, value in self.progress.accuracy.items()}
            self.store.save(self.progress.round, asdict(self.progress), required=required, accuracy=accuracy)
