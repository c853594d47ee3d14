"""The model's tokenizer as episodes use it: text to tokens and back, and chat messages that are only ever appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rollout.vllm_child import whole_text
from pmpo_megatron.types import TokenIds, to_token_ids

Message = Mapping[str, Any]  # as chat templates take them: role, content
TURN, PROBE = "qXturnXq", "qXprobeXq"  # contents that no template has by itself


class TemplateError(ConfigError):
    """The model's chat template cannot do what an episode asks of it: no episode could go on."""

    def __init__(self, why: str) -> None:
        super().__init__("model.path", f"its chat template {why}")


class ChatTokenizer:
    """Encodes and decodes, and renders chat messages.

    Args:
        tokenizer: of transformers.
        vocab_size: of the model: its embedding has no row for a greater token.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def encode(self, said: str | Sequence[int]) -> TokenIds:
        """Tokens of a text, by itself, or token ids as they are.

        Raises:
            ValueError: a token is not one of the model's.
        """
        ids = to_token_ids(self._tokenizer.encode(said, add_special_tokens=False) if isinstance(said, str) else said)
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise ValueError(f"token {int(ids.max())} is not one of the model's {self._vocab_size}")
        return ids

    def decode(self, token_ids: TokenIds) -> str:
        """Their text without special tokens."""
        return whole_text(self._tokenizer, token_ids.tolist())

    def opening(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> TokenIds:
        """What stands before the assistant's first turn.

        Raises:
            TemplateError: there is no template, or it cannot render these messages.
        """
        return self.encode(self._render(messages, tools))

    def between(self, last_token: int | None, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> TokenIds:
        """What stands between a turn of the assistant, whose last token is ``last_token``, and its next one after ``messages``.

        It is what follows the turn where the template renders a conversation that ends with ``messages``. It is the same
        after every history, if what precedes the messages does not depend on them, which is tried with other contents.

        Raises:
            TemplateError: there is no template, it refuses these roles, or it does not append.
        """
        history = [{"role": "user", "content": "?"}, {"role": "assistant", "content": TURN}]
        before, turn, rest = self._render([*history, *messages], tools).partition(TURN)
        probes = [{**message, "content": PROBE} for message in messages]
        before_probes, _, rest_of_probes = self._render([*history, *probes], tools).partition(TURN)
        if not turn or before != before_probes or rest_of_probes.count(PROBE) != len(messages):
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(f"does not append messages (role {roles}) to what was said; policy.tell takes text as it is")
        last = "" if last_token is None else str(self._tokenizer.convert_ids_to_tokens(last_token))
        if last in self._tokenizer.all_special_tokens:
            if not rest.startswith(last):
                raise TemplateError(f"goes on after a turn with {rest[:20]!r}, but the model ends its turns with {last!r}")
            rest = rest.removeprefix(last)
        return self.encode(rest)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        if not self._tokenizer.chat_template:
            raise TemplateError("is missing; policy.tell takes text as it is")
        given = [dict(message) for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(given, tools=tools, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program of the model's
            raise TemplateError(f"cannot render messages of roles {[m.get('role') for m in given]}: {error!r}") from None
