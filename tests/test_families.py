"""Every family of transformers' causal mapping: packed and right, left to stock layers and right, or refused in one
sentence when the cache is made. `python tests/families.py` writes the table of docs/families.md."""

from __future__ import annotations

import families
import pytest

PACKED = (
    "gemma", "gemma3_text", "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite", "lfm2", "llama",
    "llama4_text", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "qwen3_next", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
STOCK = ("deepseek_v32", "glm_moe_dsa", "mamba2")
"""Right and not packed: attention to chosen keys, and none."""


@pytest.mark.parametrize("kind", families.names())
def test_packed_and_right_or_refused_by_name(kind: str) -> None:
    found = families.examine(kind)
    assert found.outcome in ("packed", "stock", "refused"), found
    if kind in PACKED:
        assert found.outcome == "packed", found
    if kind in STOCK:
        assert found.outcome == "stock", found
