"""Every layout computes what one process computes, and that is what transformers computes.

A whole optimizer step, off-policy, with active clipping, packed uneven micro-batches, a data-parallel rank with a
micro-batch of padding only, and a context-parallel rank whose shard holds no response token.
"""

from itertools import pairwise

import pytest
import torch

from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.safetensors import SafetensorsReader
from pmpo_megatron.hf.shape import read_shape
from tests.distributed.harness import run_ranks
from tests.distributed.parity_worker import SAMPLED_TOKENS, TEMPERATURE, micro_batches
from tests.tiny_models import KINDS, save_tiny_model
from tests.weights import unshard

TRAINED = ("qwen2", "qwen3-tied")
MIXTURES = ("qwen2-moe", "qwen3-moe-mixed")
DENSE = [kind for kind in KINDS if KINDS[kind][0] in ("Qwen2Config", "Qwen3Config", "LlamaConfig")]
TOLERANCE = 1e-5
MIXTURE_TOLERANCE = 5e-5  # few tokens meet an expert: fewer terms of both signs to a sum, 9e-6 seen

SINGLE = {"single": {}, "recompute": dict(recompute="full"), "selective": dict(recompute="selective")}
PAIR = {
    "tp2": dict(tensor=2),
    "tp2-sp": dict(tensor=2, sequence_parallel=True),
    "pp2": dict(pipeline=2),
    "pp2-interleaved": dict(pipeline=2, virtual_pipeline=2),
    "cp2": dict(context=2),
    "dp2": {},
    "dp2-replicated-optimizer": dict(distributed=False),
}
FOUR = {
    "tp2-pp2": dict(tensor=2, pipeline=2),
    "tp2-cp2": dict(tensor=2, context=2),
    "tp2-sp-cp2": dict(tensor=2, context=2, sequence_parallel=True),
    "dp2-cp2": dict(context=2),
    "dp2-pp2": dict(pipeline=2),
}
EIGHT = {
    "tp2-sp-pp2-cp2": dict(tensor=2, sequence_parallel=True, pipeline=2, context=2),
    "tp2-pp2-dp2": dict(tensor=2, pipeline=2),
    "dp2-cp2-tp2-recompute": dict(tensor=2, context=2, recompute="full"),
    "cp4-dp2": dict(context=4),
    "pp2-interleaved-cp2-tp2": dict(tensor=2, pipeline=2, virtual_pipeline=2, context=2),
}
EXPERTS = {
    "dp4-ep2": dict(expert=2),
    "tp2-sp-ep2": dict(tensor=2, sequence_parallel=True, expert=2),
    "pp2-ep2": dict(pipeline=2, expert=2),
    "cp2-ep2": dict(context=2, expert=2, recompute="selective"),
}
MORE_EXPERTS = {
    "tp2-sp": dict(tensor=2, sequence_parallel=True),
    "tp2-sp-ep2-etp1": dict(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
    "tp2-sp-ep4-etp1": dict(tensor=2, sequence_parallel=True, expert=4, expert_tensor=1),
    "tp2-sp-cp2-ep2-etp1": dict(tensor=2, sequence_parallel=True, context=2, expert=2, expert_tensor=1),
    "dp4-ep4-recompute": dict(expert=4, recompute="full"),
    "dp4-ep2-replicated-optimizer": dict(expert=2, distributed=False),
    "pp2-interleaved-ep2": dict(pipeline=2, virtual_pipeline=2, expert=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {kind: str(save_tiny_model(kind, tmp_path_factory.mktemp(kind))) for kind in KINDS}


class Layouts:
    """Runs a group of layouts once for some kinds of models, when the first test asks for one of them."""

    def __init__(self, models):
        self.models, self.found = models, {}

    def get(self, world_size, layouts, name, task, kinds):
        group = (world_size, task, tuple(layouts), tuple(kinds))
        if group not in self.found:
            paths = {kind: self.models[kind] for kind in kinds}
            ranks = run_ranks(
                world_size, "tests.distributed.parity_worker:run_layouts", list(layouts.values()), paths, task, timeout=280
            )
            self.found[group] = {key: [rank[i] for rank in ranks] for i, key in enumerate(layouts)}
        return self.found[group][name]


@pytest.fixture(scope="module")
def runs(models):
    return Layouts(models)


def whole(ranks, kind, pick, mapping):
    """Every parameter from the shards of all ranks. Copies (data, context, unsplit over tensor) must agree bit by bit."""
    shards = {}
    for rank in ranks:
        for name, shard in pick(rank[kind]).items():
            first = shards.setdefault(name, {}).setdefault(rank[mapping.entry(name).expert is not None], shard)
            assert torch.equal(first, shard), f"{name}: copies differ by {(first - shard).abs().max()}"
    full = {}
    for name, parts in shards.items():
        entry, ordered = mapping.entry(name), [parts[i] for i in sorted(parts)]
        if entry.tensor_parallel_dim is None:
            assert all(torch.equal(ordered[0], part) for part in ordered), f"{name}: tensor-parallel copies differ"
        full[name] = unshard(entry, ordered)
    return full


def assert_close(found, expected, what, tolerance):
    assert found.keys() >= expected.keys(), expected.keys() - found.keys()
    for name, reference in expected.items():
        error = (found[name] - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
        assert error <= tolerance, f"{what} of {name}: relative error {error:.2e}"


def check_training(runs, world_size, layouts, name, kind, kinds=TRAINED):
    mapping = WeightMapping(read_shape(runs.models[kind]))
    reference, found = (runs.get(*which, "train", kinds) for which in ((1, SINGLE, "single"), (world_size, layouts, name)))
    tolerance = MIXTURE_TOLERANCE if kind in MIXTURES else TOLERANCE
    reader, streamed = SafetensorsReader(runs.models[kind]), found[0][kind]["streamed"]
    assert streamed.keys() == mapping.hf_shapes.keys()
    assert all(torch.equal(tensor, reader(name)) for name, tensor in streamed.items()), "what the ranks loaded"
    for step in range(2):
        expected = whole(reference, kind, lambda r, s=step: r["gradients"][s], mapping)
        assert_close(whole(found, kind, lambda r, s=step: r["gradients"][s], mapping), expected, f"gradient {step}", tolerance)
    expected = whole(reference, kind, lambda r: r["values"], mapping)
    assert_close(whole(found, kind, lambda r: r["values"], mapping), expected, "updated value", tolerance)
    for one, other in zip(reference[0][kind]["results"], found[-1][kind]["results"], strict=True):
        assert other.applied and other.problem is None
        for quantity in ("loss", "grad_norm", "entropy", "kl", "num_tokens", "learning_rate"):
            wanted = getattr(one, quantity)
            assert getattr(other, quantity) == (wanted and pytest.approx(wanted, rel=tolerance)), quantity
        order, reference_order = other.trajectories["sample_id"].argsort(), one.trajectories["sample_id"].argsort()
        for quantity, values in one.trajectories.items():
            assert other.trajectories[quantity][order] == pytest.approx(values[reference_order], rel=1e-4), quantity


@pytest.mark.parametrize("kind", TRAINED)
class TestOptimizerStep:
    def test_the_step_is_worth_comparing(self, runs, kind):
        first, second = runs.get(1, SINGLE, "single", "train", TRAINED)[0][kind]["results"]
        assert 0.05 < first.trajectories["clip_fraction"].mean() < 0.6 and (first.trajectories["p"] < 0.95).sum() >= 3
        assert first.num_tokens == SAMPLED_TOKENS and second.kl > 0.01
        assert first.grad_norm > 0.5, "the gradient is clipped, too"

    @pytest.mark.parametrize("name", ["recompute", "selective"])
    def test_recompute(self, runs, name, kind):
        check_training(runs, 1, SINGLE, name, kind)

    @pytest.mark.parametrize("name", PAIR)
    def test_two_processes(self, runs, name, kind):
        check_training(runs, 2, PAIR, name, kind)

    @pytest.mark.parametrize("name", FOUR)
    def test_four_processes(self, runs, name, kind):
        check_training(runs, 4, FOUR, name, kind)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", EIGHT)
    def test_eight_processes(self, runs, name, kind):
        check_training(runs, 8, EIGHT, name, kind)

    def test_a_context_rank_without_response_tokens_took_part(self, runs, kind):
        assert any(rank[kind]["empty_shards"] for rank in runs.get(2, PAIR, "cp2", "train", TRAINED))


@pytest.mark.parametrize("kind", MIXTURES)
class TestOptimizerStepWithExperts:
    @pytest.mark.parametrize("name", ["recompute", "selective"])
    def test_recompute(self, runs, name, kind):
        check_training(runs, 1, SINGLE, name, kind, MIXTURES)

    @pytest.mark.parametrize("name", EXPERTS)
    def test_experts_on_several_ranks(self, runs, name, kind):
        check_training(runs, 4, EXPERTS, name, kind, MIXTURES)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", MORE_EXPERTS)
    def test_more_layouts_with_experts(self, runs, name, kind):
        check_training(runs, 4, MORE_EXPERTS, name, kind, MIXTURES)


@pytest.fixture(scope="module")
def transformers_scores(models):
    """{kind: (log-probs, entropies, logits) per micro-batch}, every sequence alone, in float32."""
    import transformers

    found = {}
    for kind, path in models.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        found[kind] = [score_with(model, batch) for batch in micro_batches(1, 0, 1)]
    return found


@torch.no_grad()
def score_with(model, batch):
    logits = torch.cat([model(batch.tokens_T[None, start:end]).logits[0] for start, end in pairwise(batch.boundaries)])
    log_probs = (logits / TEMPERATURE).log_softmax(-1)
    response = batch.trajectory_T >= 0
    chosen = log_probs.gather(1, batch.targets_T[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return torch.where(response, chosen, 0.0), torch.where(response, entropy, 0.0), logits


class TestAgainstTransformers:
    def check(self, ranks, kind, expected, logits):
        for rank in (rank for rank in ranks if rank[kind]["log_probs"]):
            for index, (log_probs, entropy, reference) in enumerate(expected[kind]):
                assert (rank[kind]["log_probs"][index] - log_probs).abs().max() <= 1e-4
                assert (rank[kind]["entropy"][index] - entropy).abs().max() <= 1e-4
                if logits:
                    assert (rank[kind]["logits"][index] - reference).abs().max() <= 1e-4

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_process(self, runs, kind, transformers_scores):
        assert max(part[2].abs().max() for part in transformers_scores[kind]) > 0.5, "logits worth comparing"
        self.check(runs.get(1, {"single": {}}, "single", "logits", KINDS), kind, transformers_scores, True)

    @pytest.mark.parametrize("kind", DENSE)
    @pytest.mark.parametrize("name", ["tp2", "tp2-sp", "pp2", "cp2"])
    def test_two_processes(self, runs, name, kind, transformers_scores):
        layouts = {key: PAIR[key] for key in ("tp2", "tp2-sp", "pp2", "cp2")}
        self.check(runs.get(2, layouts, name, "logits", DENSE), kind, transformers_scores, name.startswith("tp"))
