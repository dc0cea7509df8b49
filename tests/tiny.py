"""A model of two layers with random weights and a tokenizer of single bytes, for tests that need no sense."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer(chat: bool = True) -> Any:
    """One token per byte, and <end>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate([*alphabet, "<end>"])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    if chat:
        made.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    return made


def llama(seed: int = 0, **changes: Any) -> Any:
    """A Llama of float64 weights, large enough that its predictions differ from token to token."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8192, "initializer_range": 0.5,
        "bos_token_id": None, "eos_token_id": 256, "attn_implementation": "sdpa",
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).double().eval().requires_grad_(False)
