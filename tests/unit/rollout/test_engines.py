"""How several vLLMs on one host share a batch and the GPUs; that they run is tested with real ones in tests/integration."""

import numpy as np
import pytest
import torch

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.rollout.vllm_engine import divide, make_requests
from pmpo_megatron.rollout.vllm_process import Launch, visible_gpus
from pmpo_megatron.types import Prompt


def names(count: int, samples: int) -> list[str]:
    prompts = [Prompt(10 * index, np.array([1, 2], np.int32), "", ()) for index in range(count)]
    return [name for name, *_ in make_requests(prompts, SamplingConfig(samples_per_prompt=samples), 0)]


@pytest.mark.parametrize("engines", [1, 2, 3, 8])
def test_prompts_go_to_engines_in_turn_and_their_responses_stay_together(engines):
    requests = [(name, [1], {}) for name in names(5, 4)]
    shares = divide(requests, engines)
    assert len(shares) == engines
    assert sorted(request for share in shares for request in share) == sorted(requests), "each once"
    for engine, share in enumerate(shares):
        assert {int(name.split("/")[0]) % engines for name, *_ in share} <= {engine}


def test_what_is_missing_is_divided_among_all():
    missing = [(name, [1], {}) for name in ("0/3", "2/0", "2/1", "4/3")]
    assert [[name for name, *_ in share] for share in divide(missing, 2)] == [["0/3", "4/3"], ["2/0", "2/1"]]


def test_every_engine_has_gpus_of_its_own_first_and_sees_the_others(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    environments = [Launch({"tensor_parallel_size": 2}, "cuda", 3, number, 4).environment() for number in range(4)]
    assert environments[0] == {"OMP_NUM_THREADS": "3"}, "the first takes the first"
    assert environments[1] == {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "2,3,4,5,6,7,0,1"}
    assert visible_gpus(1, 2) == "2,3,4,5,6,7,0,1"
    assert visible_gpus(3, 2) == "6,7,0,1,2,3,4,5"
    with pytest.raises(RolloutError, match="engine 4 of the rollouts needs GPUs 8 to 9; here are 8"):
        visible_gpus(4, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert visible_gpus(1, 1) == "GPU-b,GPU-a"
