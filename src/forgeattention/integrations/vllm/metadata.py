"""What vLLM says of a step, kept for the layers of one group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder


@dataclass
class Metadata:
    """A step of one group of layers.

    Attributes:
        builder: what made it, which keeps the group's tables.
        rows, tokens: sequences of the step, and their new tokens.
        starts: int32 [rows + 1], where each row's new tokens start among the step's.
        lengths: int32 [rows], tokens of each row, the new ones included.
        table: int32 [rows, most blocks], the block table.
        slots: int64 [tokens], places of the new tokens in the group's blocks.
        starts_host, lengths_host: the same on the host; lengths of rows with drafts are upper bounds.
        max_length: no row is longer.
        decode_rows, decode_tokens: the first rows, which have so many new tokens each.
        step: made by the first layer that needs it.
    """

    builder: Any
    rows: int
    tokens: int
    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor
    starts_host: np.ndarray
    lengths_host: np.ndarray
    max_length: int
    decode_rows: int
    decode_tokens: int
    step: Any = field(default=None, repr=False)


class Builder(AttentionMetadataBuilder[Metadata]):
    """Keeps references: what a step's layers need is made on the device."""

    supports_update_block_table = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.tables: Any = None
        self.encoder: Any = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER if current_platform.is_cpu() else AttentionCGSupport.UNIFORM_BATCH

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise ValueError("[vllm] expected causal attention; got another mask")
        starts = m.query_start_loc_cpu.numpy().astype(np.int64)
        new = np.diff(starts)
        threshold = self.reorder_batch_threshold
        assert threshold is not None
        rows, tokens = 0, int(new[0]) if len(new) else 1
        if 0 < tokens <= threshold:
            rows = int(np.argmax(new != tokens)) if (new != tokens).any() else len(new)
        return Metadata(
            self,
            m.num_reqs,
            m.num_actual_tokens,
            m.query_start_loc,
            m.seq_lens[: m.num_reqs],
            m.block_table_tensor,
            m.slot_mapping,
            starts,
            m.seq_lens_cpu_upper_bound.numpy().astype(np.int64),
            m.max_seq_len,
            rows,
            tokens,
        )
