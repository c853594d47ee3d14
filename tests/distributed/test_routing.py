"""A mixture's routes: what is told is done, on every layout, and what is done is counted and drawn toward balance."""

import numpy as np
import pytest
import torch

from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.model.routing import route_format
from tests.distributed.harness import run_ranks
from tests.distributed.parity_worker import TEMPERATURE, micro_batches
from tests.distributed.routing_worker import told_samples
from tests.tiny_models import save_tiny_model

WORKER = "tests.distributed.routing_worker"
SINGLE = {"single": {}, "recompute": dict(recompute="full"), "selective": dict(recompute="selective")}
PAIR = {
    "tp2-sp": dict(tensor=2, sequence_parallel=True),
    "cp2": dict(context=2),
    "pp2": dict(pipeline=2),
    "pp2-interleaved-recompute": dict(pipeline=2, virtual_pipeline=2, recompute="full"),
    "ep2-selective": dict(expert=2, recompute="selective"),
}
TOLERANCE = 1e-4  # of the largest change of a tensor by two steps
SPACING = 2**-23  # of the weights that are subtracted from each other, which are below 2
SLOW_TOO = ["qwen3-moe", pytest.param("qwen3-moe-mixed", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=["qwen3-moe", "qwen3-moe-mixed"])
def path(request, tmp_path_factory):
    return str(save_tiny_model(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def single(path):
    [found] = run_ranks(1, f"{WORKER}:run_layouts", [*SINGLE.values()], path, timeout=280)
    return dict(zip(SINGLE, found, strict=True))


@pytest.fixture(scope="module")
def pair(path):
    ranks = run_ranks(2, f"{WORKER}:run_layouts", [*PAIR.values()], path, timeout=280)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(PAIR)}


def log_probs_of(ranks, case):
    """By the samples of a micro-batch."""
    return {ids: values for rank in ranks for ids, values in rank[case]["log_probs"]}


def check(ranks, reference, case):
    expected = reference[case]
    for ids, values in log_probs_of(ranks, case).items():
        wanted = [log_probs_of([reference], case)[ids]] if ids in log_probs_of([reference], case) else []
        for each in wanted:
            assert (values - each).abs().max() <= 1e-5, ids
    for rank in ranks:
        assert torch.equal(rank[case]["counts"], expected["counts"])
        assert rank[case]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert ranks[0][case]["changes"].keys() == expected["changes"].keys()
    for name, change in ranks[0][case]["changes"].items():
        wanted = expected["changes"][name]
        assert (change - wanted).abs().max() <= TOLERANCE * wanted.abs().max() + 3 * SPACING, name


@pytest.mark.parametrize("case", ["told", "own", "old", "balanced"])
class TestLayouts:
    @pytest.mark.parametrize("name", ["recompute", "selective"])
    def test_recompute(self, single, name, case):
        check([single[name]], single["single"], case)

    @pytest.mark.parametrize("path", SLOW_TOO, indirect=True)
    @pytest.mark.parametrize("name", PAIR)
    def test_two_processes(self, single, pair, name, case):
        check(pair[name], single["single"], case)


def test_what_is_told_matters_and_what_is_own_does_not(single):
    cases = single["single"]
    told, own, old = (cases[name] for name in ("told", "own", "old"))
    assert max((a - b).abs().max() for (_, a), (_, b) in zip(told["log_probs"], own["log_probs"], strict=True)) > 0.1
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(old["log_probs"], own["log_probs"], strict=True))
    first = max(float(change.abs().max()) for change in own["changes"].values())
    gaps = [float((old["changes"][name] - change).abs().max()) for name, change in own["changes"].items()]
    assert 0 < max(gaps) < first, "the second step's routes are those of before the first one, some of which had moved"


class Forced:
    """transformers' model, whose tokens go to the experts that they are told to go to."""

    def __init__(self, path):
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.routes, self.format = route_format(read_shape(path)), read_shape(path).experts
        self.logits, self.chosen = {}, {}
        for number, layer in enumerate(self.model.model.layers):
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(lambda _, __, out, number=number: self.force(number, *out))

    def force(self, layer, logits, _, own):
        told = torch.from_numpy(self.now[:, layer].astype(np.int64))
        chosen = torch.where(told == self.routes.unknown, own, told)
        weights = logits.softmax(-1).gather(1, chosen)
        self.logits.setdefault(layer, []).append(logits)
        self.chosen.setdefault(layer, []).append(chosen)
        return logits, weights / weights.sum(-1, keepdim=True) if self.format.normalized else weights, chosen

    def log_probs(self, sample):
        """Of the response's tokens."""
        ids, self.now = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long(), sample.routes
        logits = self.model(ids[None]).logits[0] / TEMPERATURE
        return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[len(sample.prompt_ids) - 1 :, 0]


def test_told_routes_are_what_transformers_computes_with_them(single, path):
    forced, found = Forced(path), log_probs_of([single["single"]], "told")
    samples = {sample.sample_id: sample for sample in told_samples(forced.routes)}
    for packed in micro_batches(1, 0, 1):
        for number, sample_id in enumerate(packed.sample_ids):
            ours, sample = found[packed.sample_ids][packed.trajectory_T == number], samples[sample_id]
            expected = forced.log_probs(sample).detach()
            if sample.sampled is not None:
                expected = expected[torch.from_numpy(sample.sampled)]
            assert (ours - expected).abs().max() <= 1e-4
    counts = single["single"]["told"]["counts"]
    known = sum(int((sample.routes[:, 0, 0] != forced.routes.unknown).sum()) for sample in samples.values())
    for layer, chosen in forced.chosen.items():
        load = torch.cat(chosen).flatten().bincount(minlength=forced.routes.num_experts)
        assert torch.equal(counts[layer, :-2], load) and counts[layer, -2] == known
        assert counts[layer, -1] > known / 2, "random routes are hardly ever the router's own"


def test_the_balance_loss_is_the_textbooks(path):
    """coefficient * E * sum of f * P in every layer, P alone with a gradient, over all tokens of the step."""
    [(without, with_loss)] = run_ranks(1, f"{WORKER}:gradients_of_routers", path, (0.0, 0.7))
    forced = Forced(path)
    for sample in told_samples(forced.routes):
        forced.log_probs(sample)
    loss, experts = 0.0, forced.routes.num_experts
    for layer, logits in forced.logits.items():
        share = torch.cat(forced.chosen[layer]).flatten().bincount(minlength=experts).double()
        loss = loss + 0.7 * experts * (share / share.sum() * torch.cat(logits).double().softmax(-1).mean(0)).sum()
    loss.backward()
    for layer in forced.logits:
        name = f"decoder.layers.{layer}.mlp.router.weight"
        expected = forced.model.model.layers[layer].mlp.gate.weight.grad
        assert (with_loss[name] - without[name] - expected).abs().max() <= 1e-4 * expected.abs().max()
