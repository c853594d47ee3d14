"""A run, as its pipeline: rollouts, old log-probs, optimizer steps on the objective, new weights into the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pmpo_megatron.algo.rejection import Rejection
from pmpo_megatron.bridge.source import give_back_cache
from pmpo_megatron.bridge.sync import WeightBridge
from pmpo_megatron.checkpoint.store import CheckpointStore
from pmpo_megatron.model.micro_batch import MicroBatch, ScoredMicroBatch
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.model.step_results import StepResult
from pmpo_megatron.monitor import Maximum, Mean, Metric, PhaseTimer, RunLog
from pmpo_megatron.parallel.collectives import any_rank, barrier, broadcast_object
from pmpo_megatron.parallel.liveness import doing
from pmpo_megatron.parallel.stand_by import StandBy
from pmpo_megatron.training.collector import Collector, RoundBatch
from pmpo_megatron.training.guards import check_mismatch, check_step, dump_step
from pmpo_megatron.training.held_out import Evaluator
from pmpo_megatron.training.progress import RunProgress
from pmpo_megatron.training.round_metrics import measure_mismatch, step_metrics, trajectory_record
from pmpo_megatron.training.routes import measure_routing, replayed_routes
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.training.shares import share_round
from pmpo_megatron.training.sources import objective_metrics
from pmpo_megatron.training.token_examples import token_examples
from pmpo_megatron.types import TrajectoryTable

logger = logging.getLogger(__name__)


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
            with self.rollout_phase():
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
        if self.config.round.mode == "synchronous":
            with self.rollout_phase():
                return self._collect_now()
        overlapped = self.config.round.mode == "overlapped"
        if not overlapped or self.pushed is None:
            batch, table = self._collect_now()
        else:
            batch, table = self._wait_for_batch()
            if table is not None:
                self.push_weights()
                self.evaluate()
        further = self.progress.round + 1 < self.config.run.rounds
        if table is not None and overlapped and further and self.collector is not None:
            self.collector.start(self.progress.round + 1)
        return batch, table

    @contextmanager
    def rollout_phase(self) -> Iterator[None]:
        """Rollouts run inside, and nothing trains. Nobody takes memory that another rank, or the engine, has not given yet."""
        policies = [policy for policy in (self.policy, self.reference) if policy is not None]
        with self.timer.phase("offload"):
            for policy in policies:
                policy.gather.finish()
                policy.memory.begin_rollouts()
            give_back_cache(self.state.device)
            barrier(self.state, "the beginning of rollouts")
        yield
        with self.timer.phase("offload"):
            if self.collector is not None and self.config.rollout.sleep != "none":
                self.collector.engine.sleep()
            barrier(self.state, "the end of rollouts")
            for policy in policies:
                policy.memory.begin_training()

    def _collect_now(self) -> tuple[RoundBatch | None, TrajectoryTable | None]:
        self.push_weights()
        self.evaluate()
        return self._wait_for_batch()

    def _wait_for_batch(self) -> tuple[RoundBatch | None, TrajectoryTable | None]:
        with self.timer.phase("rollouts"):
            give_back_cache(self.state.device)
            batch = self.stand_by.run(self._collect_here)
            return batch, broadcast_object(None if batch is None else batch.table, self.state)

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
