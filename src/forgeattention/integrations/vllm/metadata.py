"""What vLLM says of a step, kept for the layers of one group."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder


class Metadata:
    """A step of one group of layers. What needs the host is worked out when asked for: a graph's replay never asks.

    Args:
        builder: what made it, which keeps the group's tables.
        common: vLLM's CommonAttentionMetadata of the step.

    Attributes:
        rows, tokens: sequences of the step, and their new tokens.
        starts: int32 [rows + 1], where each row's new tokens start among the step's.
        lengths: int32 [rows], tokens of each row, the new ones included.
        table: int32 [rows, most blocks], the block table.
        slots: int64 [tokens], places of the new tokens in the group's blocks.
        max_length: no row is longer.
        step: made by the first layer that needs it.
    """

    def __init__(self, builder: Any, common: Any) -> None:
        self.builder, self._common = builder, common
        self.rows: int = common.num_reqs
        self.tokens: int = common.num_actual_tokens
        self.starts: torch.Tensor = common.query_start_loc
        self.lengths: torch.Tensor = common.seq_lens[: self.rows]
        self.table: torch.Tensor = common.block_table_tensor
        self.slots: torch.Tensor = common.slot_mapping
        self.max_length: int = common.max_seq_len
        self.step: Any = None
        self._kept: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, layer: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Copies new keys and values [tokens, kv_heads, head_dim] for layers that share them, if any row is a prompt's.

        Those attend to a chunk's own tokens as this layer does, but are not given them; and in piecewise CUDA graphs
        the memory of this layer's is used again before they run.
        """
        if layer.read_by_others and self.decode_rows < self.rows:
            self._kept[layer] = key.clone(), value.clone()

    def given(
        self, layer: Any, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A layer's new keys and values, those that were kept if it shares them; None where no row is a prompt's."""
        return self._kept.get(layer.source, (key, value))

    @cached_property
    def starts_host(self) -> NDArray[np.int64]:
        return self._common.query_start_loc_cpu.numpy().astype(np.int64)

    @cached_property
    def lengths_host(self) -> NDArray[np.int64]:
        """Upper bounds for rows with drafts."""
        return self._common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)

    @cached_property
    def decode_tokens(self) -> int:
        """New tokens of each row that decodes: as many as the first row has."""
        return int(self.starts_host[1]) if self.rows else 1

    @cached_property
    def decode_rows(self) -> int:
        """The first rows, which have `decode_tokens` new tokens each, if those are few enough."""
        if not 0 < self.decode_tokens <= self.builder.reorder_batch_threshold:
            return 0
        other = np.diff(self.starts_host) != self.decode_tokens
        return int(np.argmax(other)) if other.any() else self.rows


class Builder(AttentionMetadataBuilder[Metadata]):
    """Keeps references: what a step's layers need is made on the device.

    Attributes:
        writers: layers of the group that write keys and values; others read those of one of them.
        tables, encoder: of the group, once a step on a GPU has made them.
    """

    supports_update_block_table = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = self.vllm_config.compilation_config.static_forward_context
        shared = (getattr(layers.get(name), "kv_sharing_target_layer_name", None) for name in self.layer_names)
        self.writers = sum(target is None for target in shared)
        self.tables: Any = None
        self.encoder: Any = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER if current_platform.is_cpu() else AttentionCGSupport.UNIFORM_BATCH

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        if common_attn_metadata.causal is not True:
            raise ValueError("[vllm] expected causal attention; got another mask")
        return Metadata(self, common_attn_metadata)
