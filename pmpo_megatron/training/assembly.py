"""Starts the parts of a run, hands them to the trainer, and ends them in the right order whatever happens."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pmpo_megatron.bridge.lanes import nodes_of_ranks
from pmpo_megatron.bridge.sync import WeightBridge
from pmpo_megatron.checkpoint.store import CheckpointStore
from pmpo_megatron.config import to_plain
from pmpo_megatron.data.prompts import DataConfig, PromptSet, load_prompts
from pmpo_megatron.data.sampler import make_sampler
from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.monitor import RunLog, write_report
from pmpo_megatron.parallel.collectives import broadcast_object, gather_objects
from pmpo_megatron.parallel.liveness import report_failure
from pmpo_megatron.parallel.stand_by import StandBy
from pmpo_megatron.parallel.state import ParallelState, initialize, shut_down
from pmpo_megatron.rewards import RewardScorer
from pmpo_megatron.rollout.engine import RolloutEngine
from pmpo_megatron.rollout.factory import make_engine
from pmpo_megatron.rollout.node_agent import NodeAgent
from pmpo_megatron.rollout.remote_process import NodeAddress, own_nodes
from pmpo_megatron.rollout.vllm_process import give_up_starts
from pmpo_megatron.training.collector import Collector
from pmpo_megatron.training.held_out import Evaluator
from pmpo_megatron.training.launch import StopRequest
from pmpo_megatron.training.progress import RunProgress
from pmpo_megatron.training.routes import replayed_routes
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.training.stream import StreamCollector
from pmpo_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)
WORKER_EXTENSION = "pmpo_megatron.bridge.vllm_worker.WeightReceiver"


def run(config: RunConfig, stop: StopRequest, prompts: Mapping[str, PromptSet]) -> int:
    """Runs ``config`` on the processes that torchrun started; returns the exit code. Collective.

    Args:
        prompts: on rank 0 those that `checks.check_run` has read.
    """
    state = initialize(config.parallel, device=config.run.device, seed=config.run.seed)
    logger.info("%s", state.describe())
    try:
        with ExitStack() as parts:
            stop.close = functools.partial(_interrupt, parts)
            trainer = build_trainer(config, state, stop, parts, prompts)
            stop.started()
            finished = trainer.run()
            if trainer.log is not None:
                trainer.log.close()
    except BaseException as error:
        report_failure(error)  # the other ranks' messages name this one
        raise
    if state.is_main:
        _say_goodbye(config, finished)
    shut_down()
    return 0


def _interrupt(parts: ExitStack) -> None:
    report_failure(KeyboardInterrupt("interrupted"))
    parts.close()


def build_trainer(
    config: RunConfig, state: ParallelState, stop: StopRequest, parts: ExitStack, prompts: Mapping[str, PromptSet]
) -> Trainer:
    """Everything that a run consists of, at the point that its newest checkpoint holds; ``parts`` closes what was opened."""
    data = _load_data(config, prompts) if state.is_main else None  # before anything slow: what is wrong is said in seconds
    nodes = _other_nodes(config, state, parts)
    starting = _start_engine(config, state, parts, nodes) if state.is_main else None
    if state.device.type == "cuda":
        # vLLM takes what is allocated on a device while it starts for its own: nobody may build beside it.
        if starting is not None and config.rollout.sleep != "none":
            starting.result().sleep()
        elif starting is not None:
            starting.result()
        broadcast_object(None, state)
    policy = Policy.build(config.model, config.optimizer, config.parallel, state)
    reference = None
    if config.objective.kl_coefficient:
        reference = Policy.build(config.model, None, config.parallel, state)
    store = CheckpointStore(Path(config.run.directory) / "checkpoints", config.checkpoint, policy)
    if not config.checkpoint.resume:
        store.set_aside()
    saved = store.load_latest(RunProgress.of) if config.checkpoint.resume else None
    progress = RunProgress.of(saved) if saved else RunProgress()
    if saved:
        logger.info("going on after round %d of %d", progress.round, config.run.rounds)
    engine = starting.result() if starting is not None else None
    stand_by = StandBy(state)
    parts.callback(stand_by.close)
    bridge = WeightBridge(policy, engine, config.bridge, stand_by)
    parts.callback(bridge.close)
    collector = evaluator = log = None
    if engine is not None and data is not None:  # on rank 0
        collector, evaluator, log = _main_parts(config, engine, data, progress, parts)
    return Trainer(
        config,
        policy=policy,
        reference=reference,
        stand_by=stand_by,
        bridge=bridge,
        store=store,
        collector=collector,
        evaluator=evaluator,
        log=log,
        progress=progress,
        stop=stop,
    )


def _other_nodes(config: RunConfig, state: ParallelState, parts: ExitStack) -> list[NodeAddress]:
    """Where else rank 0 starts engines: with nodes `all` an agent listens in the first rank of each. Collective."""
    if config.rollout.nodes == "own":
        return own_nodes(config.rollout)
    if config.rollout.nodes == "first":
        return []
    address, numbers = None, nodes_of_ranks(state)
    if state.local_rank == 0 and not state.is_main:
        agent = NodeAgent(logs=Path(config.run.directory) / "logs", node=str(numbers[state.rank]))
        parts.callback(agent.close)
        address = agent.address
    return [node for node in gather_objects(address, state) if node is not None]


def _start_engine(config: RunConfig, state: ParallelState, parts: ExitStack, nodes: list[NodeAddress]) -> Future[RolloutEngine]:
    """The engine starts in a thread, while this one builds the policy."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
    future = thread.submit(
        make_engine,
        config.rollout,
        model_path=config.model.path,
        device=state.device.type,
        worker_extension=WORKER_EXTENSION,
        nodes=nodes,
        in_flight=config.round.mode == "in_flight",
        routes=replayed_routes(config, read_shape(config.model.path)),
        logs=Path(config.run.directory) / "logs",
        episode=config.episode,
        longest_prompt=config.data.max_prompt_tokens,
    )
    thread.shutdown(wait=False)
    parts.callback(_end_engine, future)
    return future


def _end_engine(future: Future[RolloutEngine]) -> None:
    """One that still starts, because another part could not, is ended and not waited for."""
    if not future.done():
        give_up_starts()
    elif future.exception() is None:
        future.result().close()


def _load_data(config: RunConfig, known: Mapping[str, PromptSet]) -> tuple[PromptSet, PromptSet | None]:
    """The prompts to train on, and those held out; what is not ``known`` is read."""

    def load(section: str, data: DataConfig) -> PromptSet:
        if section not in known:
            tokenizer, vocab_size = load_tokenizer(config.model.path), read_shape(config.model.path).vocab_size
            prompts = load_prompts(data, tokenizer, vocab_size=vocab_size)
        else:
            prompts = known[section]
        if prompts.too_long:
            logger.warning("%d of %d prompts are too long and left out", prompts.too_long, prompts.too_long + len(prompts))
        return prompts

    held_out = config.evaluation.data
    return load("data", config.data), None if held_out is None else load("evaluation.data", held_out)


def _main_parts(
    config: RunConfig,
    engine: RolloutEngine,
    data: tuple[PromptSet, PromptSet | None],
    progress: RunProgress,
    parts: ExitStack,
) -> tuple[Collector, Evaluator | None, RunLog]:
    prompts, held_out = data
    sampler = make_sampler(prompts.prompts, prompts.weights, config.run.seed)
    if progress.sampler:
        sampler.restore(progress.sampler)
    scorer = RewardScorer(config.rewards, max_tokens=config.sampling.max_tokens, functions=config.reward_functions())
    make: Callable[..., Collector] = Collector
    if config.round.mode == "in_flight":
        make = partial(
            StreamCollector,
            rounds=config.run.rounds,
            versions_per_round=config.versions_per_round,
            drawn=progress.drawn,
            open=progress.open,
        )
    collector = make(
        prompts=prompts,
        sampler=sampler,
        engine=engine,
        scorer=scorer,
        sampling=config.sampling,
        batch=config.batch,
        round=config.round,
        advantage=config.objective.group_advantage,
        examples=config.monitor.rollout_samples,
    )
    parts.callback(collector.close)
    return collector, _make_evaluator(config, engine, scorer, held_out), _open_log(config, progress)


def _make_evaluator(
    config: RunConfig, engine: RolloutEngine, scorer: RewardScorer, held_out: PromptSet | None
) -> Evaluator | None:
    if held_out is None:
        return None
    return Evaluator(config.evaluation, prompts=held_out, engine=engine, scorer=scorer, sampling=config.sampling)


def _open_log(config: RunConfig, progress: RunProgress) -> RunLog:
    return RunLog(
        config.monitor, config.run.directory, run=to_plain(config), total_steps=config.run.rounds, resume=progress.log
    )


def _say_goodbye(config: RunConfig, finished: bool) -> None:
    directory = Path(config.run.directory).resolve()
    if finished and config.monitor.report:
        logger.info("done; the report of the run: %s", write_report([directory], directory / "report.html").as_uri())
    elif finished:
        logger.info("done; the record of the run: %s", directory)
    else:
        logger.info("stopped and saved; the same command goes on with the run in %s", directory)
