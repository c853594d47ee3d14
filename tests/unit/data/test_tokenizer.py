"""The tokenizer is the one that the checkpoint's files describe, whatever the architecture."""

import json

import pytest
from tokenizers import Tokenizer

from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.tiny_model import make_tokenizer


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_what_tokenizer_json_says_holds_for_every_architecture(model_type, tmp_path):
    """AutoTokenizer of Transformers 5 splits like Qwen2 where config.json says qwen2, and loses spaces here."""
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "12 + 34 =(5 ) 6"
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text) == expected and tokenizer.decode(expected) == text
    assert tokenizer.eos_token == make_tokenizer().eos_token


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="model.path.*its tokenizer cannot be read"):
        load_tokenizer(tmp_path)
