"""A run, as its pipeline: rollouts, old log-probs, optimizer steps on the objective, new weights into the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pmpo_megatron.bridge.sync import WeightBridge
from pmpo_megatron.checkpoint.store import CheckpointStore
from pmpo_megatron.config import convert, field_types
from pmpo_megatron.data.mini_batches import split_into_steps, weigh
from pmpo_megatron.data.packing import pack
from pmpo_megatron.errors import CheckpointError, ConfigError
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.model.step import TokenScores, optimizer_step, score
from pmpo_megatron.model.step_results import StepResult
from pmpo_megatron.monitor import Metric, PhaseTimer, RunLog
from pmpo_megatron.parallel.collectives import any_rank
from pmpo_megatron.parallel.liveness import doing
from pmpo_megatron.parallel.shards import sequence_multiple
from pmpo_megatron.training.collector import Collector, RoundBatch
from pmpo_megatron.training.guards import check_mismatch, check_step, dump_step
from pmpo_megatron.training.held_out import Evaluator
from pmpo_megatron.training.round_metrics import measure_mismatch, step_metrics, trajectory_record
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.training.token_examples import recorded, token_examples
from pmpo_megatron.types import MicroBatch, Sample

logger = logging.getLogger(__name__)
Scores = list[TokenScores | None]


@dataclass
class RunProgress:
    """Where a run stands: what a checkpoint holds beside the weights, the optimizer and the random states."""

    round: int = 0  # the next round
    policy_version: int = 0  # rounds whose updates the policy has seen
    skipped_in_a_row: int = 0  # optimizer steps
    evaluated: int = -1  # the last round that was evaluated before
    sampler: dict[str, Any] = field(default_factory=dict)
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
    places |= {f"accuracy of round {name}": int(name) for name in progress.accuracy}
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
        bridge: WeightBridge,
        store: CheckpointStore,
        collector: Collector | None,
        evaluator: Evaluator | None,
        log: RunLog | None,
        progress: RunProgress,
        stop: Callable[[], bool],
    ) -> None:
        self.config, self.policy, self.reference, self.bridge, self.store = config, policy, reference, bridge, store
        self.collector, self.evaluator, self.log, self.progress, self.stop = collector, evaluator, log, progress, stop
        self.state, self.temperature = policy.state, config.sampling.temperature
        self.timer = PhaseTimer()
        self.pushed: int | None = None

    def run(self) -> bool:
        """Rounds until the configured number or until someone asks to stop; saved either way. True if all were run."""
        while self.progress.round < self.config.run.rounds:
            doing(f"round {self.progress.round}")
            batch = self.collect()
            if batch is None or self.train_round(batch):
                break
        finished = self.progress.round >= self.config.run.rounds
        if finished:
            self.push_weights()
            self.evaluate()
        self.save(required=True)
        return finished

    def train_round(self, batch: RoundBatch) -> bool:
        """One round on ``batch``; True if the run should stop."""
        steps = self.pack(batch)
        with self.timer.phase("old_log_probs"):
            old = [score(self.policy, micro_batches, temperature=self.temperature) for micro_batches in steps]
            reference = [self.score_reference(micro_batches) for micro_batches in steps]
        measured = measure_mismatch(steps, old, self.config.objective.log_bounds, self.state)
        mismatch = check_mismatch(measured, self.config.guards, batch.round_index, self.state)
        results: list[StepResult] = []
        with self.timer.phase("train"):
            for index, inputs in enumerate(zip(steps, old, reference, strict=True)):
                before_last = self.score_examples(steps[-1]) if index == len(steps) - 1 else None
                results.append(self.step(index, *inputs))
        tokens = self.examples(batch, steps[-1], old[-1], before_last, results[-1]) if before_last is not None else []
        self.progress.policy_version += 1
        self.progress.round += 1
        self.progress.sampler = batch.sampler_state
        self.record(batch, results, mismatch, tokens)
        self.store.poll()
        if self.store.due(self.progress.round):
            self.save()
        return any_rank(self.stop(), self.state)

    def collect(self) -> RoundBatch | None:
        """The round's batch on every rank; None if someone asked to stop before it was complete.

        Asynchronous: the batch was generated while the round before trained, so its policy is one round older; now the
        engine is idle, gets the newest weights, and begins with the next round's.
        """
        ahead = self.config.round.asynchronous and self.pushed is not None
        if not ahead:
            self.push_weights()
            self.evaluate()
        with self.timer.phase("rollouts"):
            batch = self.bridge.attend(lambda: self.collector.collect(self.progress.round, stop=self.stop))
        if batch is None:
            return None
        if ahead:
            self.push_weights()
            self.evaluate()
        further = self.progress.round + 1 < self.config.run.rounds
        if self.config.round.asynchronous and further and self.collector is not None:
            self.collector.start(self.progress.round + 1)
        return batch

    def pack(self, batch: RoundBatch) -> list[list[MicroBatch]]:
        """This data-parallel rank's micro-batches of every optimizer step; every rank computes the same split."""
        parallel, sizes = self.config.parallel, self.config.batch
        shares = split_into_steps(
            batch.samples, steps=sizes.steps_per_round, seed=self.config.run.seed, round_index=batch.round_index
        )
        return [
            pack(
                self.weigh(samples),
                max_tokens=sizes.max_tokens_per_micro_batch,
                data_parallel_size=self.state.dp_size,
                sequence_multiple=sequence_multiple(parallel),
                micro_batch_multiple=self.state.pp_size if parallel.virtual_pipeline else 1,
            )[self.state.dp_rank]
            for samples in shares
        ]

    def weigh(self, samples: Sequence[Sample]) -> list[Sample]:
        return weigh(
            samples,
            kind=self.config.objective.trajectory_weight,
            max_length=self.config.sampling.max_tokens,
            mask_truncated=self.config.batch.mask_truncated,
        )

    def score_examples(self, micro_batches: Sequence[MicroBatch]) -> Scores | None:
        """The log-probs that the round's last step is about to see, where its examples are recorded."""
        if not self.config.monitor.token_examples or not recorded(self.progress.round, self.config.run.rounds):
            return None
        return score(self.policy, micro_batches, temperature=self.temperature)

    def examples(
        self, batch: RoundBatch, micro_batches: list[MicroBatch], old: Scores, new: Scores, result: StepResult
    ) -> list[dict[str, Any]]:
        """Some trajectories of the round's last step token by token, on rank 0. Collective."""
        return token_examples(
            micro_batches,
            old,
            new,
            result,
            batch.samples,
            objective=self.config.objective,
            progress=self.progress.round / self.config.run.rounds,
            count=self.config.monitor.token_examples,
            decode=self.collector.prompts.decode if self.collector is not None else None,
            state=self.state,
        )

    def score_reference(self, micro_batches: Sequence[MicroBatch]) -> Scores | None:
        return score(self.reference, micro_batches, temperature=self.temperature) if self.reference is not None else None

    def step(self, index: int, micro_batches: list[MicroBatch], old: Scores, reference: Scores | None) -> StepResult:
        """One optimizer step; a non-finite one is skipped, counted and written to disk, and too many in a row end the run."""
        result = optimizer_step(
            self.policy,
            micro_batches,
            old,
            objective=self.config.objective,
            progress=self.progress.round / self.config.run.rounds,
            temperature=self.temperature,
            reference_log_probs=reference,
        )
        self.progress.skipped_in_a_row = 0 if result.applied else self.progress.skipped_in_a_row + 1
        if not result.applied:
            name = f"round-{self.progress.round:08d}-step-{index:03d}"
            dump_step(Path(self.config.run.directory) / "skipped", name, micro_batches, old, reference, result, self.state)
            check_step(result, self.progress.skipped_in_a_row, self.config.guards, name, self.state)
        return result

    def push_weights(self) -> None:
        """The policy's weights into the engine, which is idle; nothing to do where it has them."""
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
            found = self.bridge.attend(lambda: self.evaluator.evaluate(done))
        if self.log is not None:
            self.progress.accuracy[str(done)] = self.log.log(done, found)["eval/accuracy_mean"]

    def record(
        self, batch: RoundBatch, results: list[StepResult], mismatch: dict[str, Metric], tokens: list[dict[str, Any]]
    ) -> None:
        """Metrics of a finished round, on rank 0."""
        times = self.timer.take()
        if self.log is None:
            return
        metrics = batch.metrics | step_metrics(results) | mismatch | times
        metrics["throughput/tokens_per_s"] = sum(s.num_tokens for s in batch.samples) / times["time/total_s"]
        metrics["rollout/staleness"] = float(self.progress.policy_version - 1 - batch.samples[0].policy_version)
        record = trajectory_record(results, batch.samples)
        self.log.log(self.progress.round, metrics, trajectories=record, rollouts=batch.examples, tokens=tokens)

    def save(self, *, required: bool = False) -> None:
        """Everything that the run needs to go on exactly from here."""
        with self.timer.phase("checkpoint"):
            if self.log is not None:
                self.progress.log = self.log.cursor()
            accuracy = {int(done): value for done, value in self.progress.accuracy.items()}
            self.store.save(self.progress.round, asdict(self.progress), required=required, accuracy=accuracy)
