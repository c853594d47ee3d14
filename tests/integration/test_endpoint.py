"""Programs that know only a base_url: the openai client against policies on a real vLLM, and requests that are refused."""

import numpy as np
import pytest

from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.hf.tiny_model import make_tokenizer
from pmpo_megatron.rollout.config import SamplingConfig
from tests.integration import plays
from tests.integration.engine_worker import engine_for, prompts, save_model
from tests.integration.test_episodes import Playing, hugging_face, rollouts_of

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
SAMPLING = SamplingConfig(samples_per_prompt=2, max_tokens=100)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = save_model("qwen2", tmp_path_factory.mktemp("model") / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def engine(path):
    made = engine_for(path)
    yield made
    made.close()


@pytest.fixture
def play(engine, path):
    made = []

    def of(name):
        made.append(Playing(engine, path, name))
        return made[-1]

    yield of
    for playing in made:
        playing.close()


def test_a_conversation_over_http_is_recorded_token_by_token(play, path):
    groups = play("agent").generate(prompts(3), SAMPLING, round_index=0)
    tokenizer = load_tokenizer(path)
    for rollout in rollouts_of(groups):
        episode, sampled = rollout.episode, rollout.sampled
        assert (episode.failure, episode.turns) == ("", 3)
        ids = np.concatenate([episode.prompt_ids, rollout.token_ids])
        expected = hugging_face(path, ids)[len(episode.prompt_ids) - 1 :]
        np.testing.assert_allclose(rollout.log_probs[sampled], expected[sampled], atol=1e-4)
    for group in groups:
        said = plays.kept[group.prompt.index]  # by one of the group's episodes
        whole = tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"] if m["role"] != "user" else text_of(m)} for m in said], tokenize=False
        )
        texts = [tokenizer.decode([*r.episode.prompt_ids, *r.token_ids]).removesuffix("<end>") for r in group.rollouts]
        assert whole.removesuffix("<end>") in texts


def text_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_a_program_of_its_own_is_trained(play):
    one = SamplingConfig(samples_per_prompt=1, max_tokens=100)
    [rollout] = rollouts_of(play("program").generate(prompts(1), one, round_index=0))
    assert rollout.episode.failure == "" and 1 <= rollout.num_sampled <= 6
    assert rollout.episode.metrics["length"] == (rollout.num_sampled == 6)


def test_requests_that_cannot_be_answered_are_told_why(play):
    one = SamplingConfig(samples_per_prompt=1, max_tokens=100)
    [rollout] = rollouts_of(play("wrong_requests").generate(prompts(1), one, round_index=0))
    assert rollout.episode.failure == ""
    kept = plays.kept
    assert kept["rewritten"][:2] == (400, "history_rewritten")
    assert kept["rewritten"][2].startswith(
        "messages[0] is {'role': 'user', 'content': 'bye'}, but it was {'role': 'user', 'cont"
    )
    assert kept["branched"][:2] == (400, "history_rewritten") and kept["branched"][2].startswith("messages[1] is")
    assert kept["repeated"] == (400, "history_rewritten", "of 1 messages all were said before: one has to be added")
    assert kept["picture"][2] == "only text is offered as content"
    assert kept["several"] == (400, "unsupported", "n = 2 is not offered; leave it out")
    assert kept["streamed"] == (400, "unsupported", "stream = True is not offered; leave it out")
    assert kept["too long"][:2] == (400, "context_length_exceeded") and kept["right"] == "answered"
    assert "guessed" not in kept and kept["both"] == [200, 409]
    assert kept["url"].startswith("http://127.0.0.1:")
    assert rollout.episode.turns == 3, "what is refused leaves the conversation as it was"
