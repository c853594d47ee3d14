"""Conversations that only grow, against the chat template's own rendering of the whole; templates for which that cannot be."""

import numpy as np
import pytest

from pmpo_megatron.hf.tiny_model import make_tokenizer
from pmpo_megatron.rollout.chat import ChatTokenizer, TemplateError

END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + END
# As Qwen3's: thoughts of earlier turns are left out, and the last turn gets empty ones.
THOUGHTLESS = (
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{% if m.role == 'tool' %}<answer>{{ m.content | trim }}</answer>"
    "{% else %}{{ m.content.split('</think>') | last }}{% endif %}<|im_end|>\n{% endfor %}" + END
)
LISTED_FIRST = "{% for m in messages if m.role == 'tool' %}{{ m.content }}{% endfor %}" + CHATML
DROPPING = "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}" + END
LAST_ONLY = "<|im_start|>user\n{{ messages[-1].content }}<|im_end|>\n" + END
NO_TOOLS = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('only user and assistant') }}{% endfor %}" + CHATML
OTHER_END = CHATML.replace("<|im_end|>", "<|im_start|>")


def chat(template):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    return tokenizer, ChatTokenizer(tokenizer, vocab_size=len(tokenizer))


@pytest.mark.parametrize("ended", [True, False])
def test_what_is_appended_is_what_the_template_has_there(ended):
    """Also where a turn was cut off: then the end of the turn is told as well."""
    tokenizer, codec = chat(CHATML)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is 1+2?"}]
    ids = [codec.opening(messages)]
    for number in range(3):
        turn = codec.encode(f"let me see {number}" + ("<|im_end|>" if ended else ""))
        added = [{"role": "tool", "content": f"= {3 + number}"}, {"role": "user", "content": "go on"}][: 1 + number % 2]
        messages += [{"role": "assistant", "content": f"let me see {number}"}, *added]
        ids += [turn, codec.between(int(turn[-1]), added)]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert np.concatenate(ids).tolist() == tokenizer.encode(whole, add_special_tokens=False)


def test_history_is_never_rendered_again():
    """A template that leaves out earlier thoughts: they stay, because the policy said them."""
    tokenizer, codec = chat(THOUGHTLESS)
    turn = codec.encode("<think>1 and 2</think>3<|im_end|>")
    assert (
        tokenizer.decode(codec.between(int(turn[-1]), [{"role": "tool", "content": " 4 "}]))
        == "\n<|im_start|>user\n<answer>4</answer><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LISTED_FIRST, r"does not append messages \(role tool\) to what was said"),
        (DROPPING, "does not append messages"),
        (LAST_ONLY, "does not append messages"),
        (NO_TOOLS, r"cannot render messages of roles \['user', 'assistant', 'tool'\]: .*only user and assistant"),
        (OTHER_END, r"goes on after a turn with '<\|im_start\|>.*', but the model ends its turns with '<\|im_end\|>'"),
        (None, "is missing; policy.tell takes text as it is"),
    ],
)
def test_a_template_that_cannot_append_is_refused(template, words):
    tokenizer, codec = chat(template)
    with pytest.raises(TemplateError, match=f"model.path: its chat template {words}"):
        codec.between(tokenizer.eos_token_id, [{"role": "tool", "content": "3"}])


def test_tokens_that_the_model_does_not_have_are_refused():
    tokenizer, codec = chat(CHATML)
    assert codec.encode([3, 4]).dtype == np.int32 and codec.decode(codec.encode("a+b")) == "a+b"
    with pytest.raises(ValueError, match=f"token {len(tokenizer)} is not one of the model's {len(tokenizer)}"):
        codec.encode([1, len(tokenizer)])
