"""The exact tokens' KV blocks: a sliding window that also keeps a sequence's first blocks.

Each packed layer has a second, exact layer beside it (`backend.ExactLayer`), whose blocks vLLM allocates, shares by
prefix and frees like those of a sliding-window layer, from the same pool as the packed ones. So exact tokens are part
of the memory that vLLM counts, live exactly as long as their sequence, and are there again after a prefix hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class ExactSpec(SlidingWindowSpec):
    """Blocks of exact keys and values.

    Attributes:
        sink_blocks: first blocks of a sequence that stay when the window has passed them.
    """

    sink_blocks: int = 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len) + self.sink_blocks


class ExactManager(SlidingWindowManager):
    """Allocates, shares and frees the blocks of an `ExactSpec`."""

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        super()._remove_blocks_in_range(request_id, max(first_block, self.kv_cache_spec.sink_blocks), last_block)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        count = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        if request_id not in self.num_cached_block:
            skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
            count += self._get_num_evictable_blocks(new_computed_blocks[: min(skipped, self.kv_cache_spec.sink_blocks)])
        return count

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        blocks = self.req_to_blocks[request_id]
        for i, block in enumerate(new_computed_blocks[: self.kv_cache_spec.sink_blocks]):
            if blocks[i] is not block:
                self.block_pool.touch([block])
                blocks[i] = block

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        found, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            *args,
            **kwargs,
        )
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for i in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            first = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if not first:
                return tuple([] for _ in found), 0
            for blocks, block in zip(found, first):
                blocks[i] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> list[bool] | None:
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs)
        if mask is not None:
            for i in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[i - start_block] = True
        return mask


def register_blocks() -> None:
    """Tells vLLM's registry of KV cache specs of `ExactSpec`; may be called again."""
    # The registry fills itself with vLLM's own specs only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ExactSpec, ExactManager, uniform_type_base_spec=ExactSpec)
