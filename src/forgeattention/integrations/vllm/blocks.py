"""The exact tokens' KV blocks: a sequence's first tokens, its window and its unfinished page.

Each packed layer has a second, exact layer beside it (`backend.ExactLayer`), whose blocks vLLM allocates, shares by
prefix and frees like those of a sliding-window layer, from the same pool as the packed ones. So exact tokens are part
of the memory that vLLM counts, and live exactly as long as their sequence. A prompt's chunk takes blocks only for the
tokens that are exact after it: its other tokens are attended and encoded straight from the model's keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from ...codec.spec import PAGE


@dataclass(frozen=True, kw_only=True)
class ExactSpec(SlidingWindowSpec):
    """Blocks of exact keys and values. `sliding_window` is the window and a page.

    Attributes:
        sink_blocks: first blocks of a sequence, which stay.
        slack: new tokens of a step that may be taken back (drafts), or are all read from the exact blocks.
    """

    sink_blocks: int = 0
    slack: int = 1

    @property
    def num_retained_tokens(self) -> int:
        """Of the tokens before a step, those whose blocks a worker may not forget (vLLM 0.33): the sinks come first."""
        return 1 << 40

    def first_kept(self, tokens: int) -> int:
        """First token after the sinks that stays exact in a sequence of so many."""
        return max(tokens - (self.sliding_window - PAGE), 0) // PAGE * PAGE

    def wanted(self, block: int, tokens: int) -> bool:
        """Whether a new block must be there when the sequence has so many tokens."""
        return block < self.sink_blocks or (block + 1) * self.block_size > self.first_kept(tokens - self.slack)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks of a sequence, whatever the size of a chunk: those from before a step, and those after."""
        most = self.sink_blocks + 2 * -(-(self.sliding_window + self.slack) // self.block_size)
        return min(most, -(-max_model_len // self.block_size))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of a sequence between two steps, which is what sequences side by side hold."""
        most = self.sink_blocks + -(-(self.sliding_window + self.slack) // self.block_size)
        return min(most, -(-vllm_config.model_config.max_model_len // self.block_size)) * self.page_size_bytes


class ExactManager(SlidingWindowManager):
    """Allocates, shares and frees the blocks of an `ExactSpec`."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.kv_cache_spec.first_kept(num_computed_tokens)

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        super()._remove_blocks_in_range(request_id, max(first_block, self.kv_cache_spec.sink_blocks), last_block)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        have = max(len(self.req_to_blocks.get(request_id, ())), len(new_computed_blocks))
        spec, required = self.kv_cache_spec, -(-num_tokens // self.block_size)
        # Only the last ones, and the sinks, are wanted.
        tail = max(have, spec.first_kept(num_tokens - spec.slack) // self.block_size)
        count = max(required - tail, 0) + max(min(spec.sink_blocks, tail) - have, 0)
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            count = min(count, self.max_admission_blocks_per_request)
        return count + self._get_num_evictable_blocks(new_computed_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        blocks, spec = self.req_to_blocks[request_id], self.kv_cache_spec
        numbers = range(len(blocks), -(-num_tokens // self.block_size))
        wanted = [spec.wanted(number, num_tokens) for number in numbers]
        taken = iter(self.block_pool.get_new_blocks(sum(wanted)))
        new = [next(taken) if want else self._null_block for want in wanted]
        blocks.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new if not block.is_null)
        return new

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Takes the sinks of a prefix hit: what else was exact before its end is read as packed."""
        blocks = self.req_to_blocks[request_id]
        assert not blocks
        if self.enable_caching:
            self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        blocks.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(blocks)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Takes blocks for the sinks that a connector brings: what else was exact before its end is read as packed."""
        blocks = self.req_to_blocks[request_id]
        count = -(-(num_local_computed_tokens + num_external_computed_tokens) // self.block_size)
        sinks = self.block_pool.get_new_blocks(max(min(count, self.kv_cache_spec.sink_blocks) - len(blocks), 0))
        blocks.extend(sinks)
        blocks.extend([self._null_block] * (count - len(blocks)))
        if self._record_new_block_ids and record_for_zeroing:
            self.new_block_ids.extend(block.block_id for block in sinks)

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
        """Whatever the packed blocks have is a hit, as long as the sinks are there.

        A hit ends at a whole page, so no unfinished page is needed, and the window's tokens are read as packed.
        """
        tokens = max_length // alignment_tokens * alignment_tokens
        count = tokens // kv_cache_spec.block_size
        found: tuple[list[Any], ...] = tuple([block_pool.null_block] * count for _ in kv_cache_group_ids)
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for i in range(min(kv_cache_spec.sink_blocks, count)):
            first = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if not first:
                return tuple([] for _ in found), 0
            for blocks, block in zip(found, first):
                blocks[i] = block
        return found, tokens

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
        return [i < kv_cache_spec.sink_blocks for i in range(start_block, end_block)]


def register_blocks() -> None:
    """Tells vLLM's registry of KV cache specs of `ExactSpec`; may be called again."""
    # The registry fills itself with vLLM's own specs only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ExactSpec, ExactManager, uniform_type_base_spec=ExactSpec)
