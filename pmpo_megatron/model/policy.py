"""The policy: this rank's part of a Megatron model with the weights of a Hugging Face checkpoint, and its optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pmpo_megatron.config import Section, setting
from pmpo_megatron.errors import MappingError
from pmpo_megatron.hf.mapping import WeightMapping, global_name, local_name
from pmpo_megatron.hf.safetensors import SafetensorsReader
from pmpo_megatron.hf.shape import ModelShape, read_shape
from pmpo_megatron.model.gather import ParameterGather
from pmpo_megatron.model.log_probs import score_hidden_states
from pmpo_megatron.model.offload import PhaseMemory
from pmpo_megatron.model.optimizer import LearningRateSchedule, OptimizerConfig, make_optimizer
from pmpo_megatron.model.routing import Router, place_routers
from pmpo_megatron.parallel.state import ParallelConfig, ParallelState
from pmpo_megatron.units import resolve_dtype

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Which model, and how much memory its activations may take."""

    path: str = setting(help="directory of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer)")
    dtype: str = setting("auto", "of weights and activations; auto: bfloat16 on GPU, float32 on CPU", choices=("auto", *DTYPES))
    layers: str = setting(
        "auto",
        "Transformer Engine's, or our own on PyTorch; auto: the former on GPUs where it is installed, the same on all ranks",
        choices=("auto", "transformer_engine", "local"),
    )
    recompute: str = setting(
        "none",
        "activations computed again in the backward pass: nothing, the MLPs, or whole layers",
        choices=("none", "selective", "full"),
    )
    log_prob_chunk: int = setting(256, "tokens whose logits exist at once", unit="tokens", minimum=1)
    offload: str = setting(
        "none",
        "GPU, round.mode synchronous: what waits in the host's memory while rollouts run: nothing, the optimizer's states, or "
        "the weights as well, the reference model's too",
        choices=("none", "optimizer", "all"),
    )

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        return DTYPES[resolve_dtype(self.dtype, device.type)]


@dataclass(frozen=True)
class Policy:
    """This rank's model chunks and what belongs to them.

    Attributes:
        chunks: Megatron's GPTModel, one, or one for each virtual pipeline stage; in Megatron's DDP where there is an optimizer.
        optimizer, scheduler: None for a model that is only scored.
        config: Megatron's TransformerConfig.
        log_prob_chunk: tokens whose logits exist at once.
        routers: of each chunk; none where no layer has experts.
        memory: what of it is on the GPU while rollouts run, and while it trains.
        gather: of the parameters after an update.
    """

    chunks: tuple[Any, ...]
    optimizer: Any
    scheduler: LearningRateSchedule | None
    shape: ModelShape
    mapping: WeightMapping
    state: ParallelState
    config: Any
    log_prob_chunk: int
    routers: tuple[tuple[Router, ...], ...]
    memory: PhaseMemory
    gather: ParameterGather

    @staticmethod
    def build(model: ModelConfig, optimizer: OptimizerConfig | None, parallel: ParallelConfig, state: ParallelState) -> Policy:
        """Builds this rank's part and loads the checkpoint of ``model.path``. Collective.

        Args:
            optimizer: None for a reference model: no optimizer, no gradients, no DDP buffers.

        Raises:
            ConfigError: the model cannot be split as ``parallel`` asks, or not be made of the layers that are wanted.
            MappingError: the checkpoint's architecture or tensors do not fit; names the file and tensor.
        """
        from pmpo_megatron.model.architecture import build_chunks, check_layout, fused_layers, transformer_config

        shape = read_shape(model.path)
        check_layout(shape, parallel)
        mapping = WeightMapping(shape)
        dtype = model.torch_dtype(state.device)
        fused = fused_layers(model.layers, state)
        config = transformer_config(shape, state, dtype=dtype, recompute=model.recompute, fused=fused)
        chunks = build_chunks(shape, config, state, fused=fused)
        load_weights(chunks, mapping, model.path, state)
        common = shape, mapping, state, config, model.log_prob_chunk, tuple(place_routers(chunk, shape) for chunk in chunks)
        if optimizer is None:
            for chunk in chunks:
                chunk.requires_grad_(False)
            memory, gather = PhaseMemory(chunks, None, model.offload, state.device), ParameterGather(())
            return Policy(tuple(chunks), None, None, *common, memory, gather)
        bucket = parallel.reduction_bucket(state.dp_size * state.cp_size)
        settings = _ddp_settings(optimizer, parallel, bucket)
        wrapped = [_wrap(chunk, config, settings, first=index == 0) for index, chunk in enumerate(chunks)]
        if bucket is not None:  # gradients are whole in the last micro-batch only
            without = [chunk.no_sync for chunk in wrapped]
            config.no_sync_func = without if len(without) > 1 else without[0]
        megatron_optimizer = make_optimizer(wrapped, optimizer)
        schedule = LearningRateSchedule(megatron_optimizer, optimizer)
        memory = PhaseMemory(wrapped, megatron_optimizer, model.offload, state.device)
        gather = ParameterGather([chunk for chunk in wrapped if chunk.use_forward_hook])
        return Policy(tuple(wrapped), megatron_optimizer, schedule, *common, memory, gather)

    @property
    def modules(self) -> tuple[Any, ...]:
        """The chunks without DDP around them."""
        return tuple(chunk.module if self.optimizer is not None else chunk for chunk in self.chunks)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(Megatron name with layer and expert counted over the whole model, this rank's shard)."""
        self.gather.finish()
        return named_parameters(self.modules, self.state)

    def score_hidden_states(
        self,
        hidden: torch.Tensor,
        targets_T: torch.Tensor,
        wanted: torch.Tensor,
        *,
        temperature: float,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs and, if wanted, entropies of what the last stage returned, as `log_probs.score_hidden_states`."""
        self.gather.finish()  # the head is read here, behind its module's back
        last = self.modules[-1]
        tied = last.share_embeddings_and_output_weights
        return score_hidden_states(
            hidden,
            last.shared_embedding_or_output_weight() if tied else last.output_layer.weight,
            targets_T,
            wanted,
            state=self.state,
            vocab_size=self.shape.vocab_size,
            temperature=temperature,
            chunk_tokens=self.log_prob_chunk,
            entropy=entropy,
        )

    def zero_gradients(self) -> None:
        self.memory.wait()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()


def named_parameters(modules: Iterable[Any], state: ParallelState) -> Iterator[tuple[str, nn.Parameter]]:
    """What `Policy.named_parameters` gives, for unwrapped chunks."""
    for module in modules:
        layers = module.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0  # Megatron counts from 1
        first_expert = state.ep_rank * (module.config.num_moe_experts or 0) // state.ep_size
        for name, parameter in module.named_parameters():
            yield global_name(name, first_layer, first_expert), parameter


def load_weights(chunks: Iterable[nn.Module], mapping: WeightMapping, path: str, state: ParallelState) -> None:
    """Fills ``chunks`` from the checkpoint in ``path``, one parameter in memory at a time.

    Raises:
        MappingError: a tensor is missing, extra or misshapen, or a parameter was not filled; names it.
    """
    reader = SafetensorsReader(path)
    mapping.check_names(reader.names, where=str(path))
    parameters = list(named_parameters(chunks, state))
    mapping.load(parameters, reader, lambda entry: state.tensor_piece(expert=entry.expert is not None))
    if state.world_size == 1:
        absent = sorted(mapping.by_megatron.keys() - {local_name(name) for name, _ in parameters} - {"output_layer.weight"})
        if absent:
            raise MappingError(f"{path}: the model built has no parameter for {', '.join(absent[:6])}")


def _ddp_settings(optimizer: OptimizerConfig, parallel: ParallelConfig, bucket: int | None) -> Any:
    """Of Megatron's DDP: float32 gradients, reduced as a whole or, if there is a ``bucket``, by its elements."""
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=bucket is not None,
        overlap_param_gather=bucket is not None and parallel.overlap_param_gather and optimizer.distributed,
        align_param_gather=True,  # hooks wait for gathers, and begin none
        bucket_size=bucket,
        use_distributed_optimizer=optimizer.distributed,
    )


def _wrap(chunk: nn.Module, config: Any, settings: Any, *, first: bool) -> nn.Module:
    """Megatron's DDP; what is reduced while other chunks go backward has one bucket."""
    from megatron.core.distributed import DistributedDataParallel

    return DistributedDataParallel(config, replace(settings), chunk, disable_bucketing=not first)
