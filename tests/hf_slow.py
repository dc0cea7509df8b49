"""What a `ForgeCache` must do, in stock layers whose keys and values are replaced by what their codes decode to; and
models of random weights to do it in."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from forgeattention import ops
from forgeattention.cache import STEP_TOKENS
from forgeattention.cache.tiles import Tiles
from forgeattention.codec import PAGE, Codec, CodecSpec
from forgeattention.codec.spec import stored_head_dim
from forgeattention.ops import PageTable


class SlowLayer(DynamicLayer):
    """A stock layer whose rows start at position start[row] and lose precision page by page, in tiles and
    with a codec where these are given."""

    def __init__(
        self,
        spec: CodecSpec,
        start: list[int] | None = None,
        backend: str = "reference",
        tiles: Tiles | None = None,
        codec: Codec | None = None,
    ) -> None:
        super().__init__()
        self.given = codec
        self.tiles = tiles
        self.spec = spec
        self.backend = backend
        self.start = start
        self.pages: list[int] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        past, n = self.get_seq_length(), key_states.shape[2]
        if not past:
            if self.given is not None:
                self.codec = self.given
            elif self.tiles is not None:
                self.codec = Codec(self.spec, self.tiles.width, self.tiles.records)
            else:
                dim = stored_head_dim(key_states.shape[3], value_states.shape[3])
                self.codec = Codec(self.spec, dim, key_states.shape[1])
            self.start = self.start or [0] * key_states.shape[0]
            self.pages = [0] * key_states.shape[0]
        exact = super().update(key_states, value_states)
        step = n == 1 or (past and n <= min(STEP_TOKENS, self.spec.window))
        self.keys, self.values = self.keys.clone(), self.values.clone()
        for row, start in enumerate(self.start or []):
            first = start + self.spec.sinks
            while past + n - first - self.pages[row] * PAGE >= self.spec.window + PAGE:
                at = slice(first + self.pages[row] * PAGE, first + (self.pages[row] + 1) * PAGE)
                for tensor, decoded in zip((self.keys, self.values), self.coded(row, at)):
                    tensor[row, :, at] = decoded
                self.pages[row] += 1
        return (self.keys, self.values) if step else exact

    def coded(self, row: int, at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        page = torch.empty(self.codec.page_bytes, dtype=torch.uint8)
        first = torch.zeros(1, dtype=torch.int64)
        given = [x[row, :, at] for x in (self.keys, self.values)]
        if self.tiles is not None:
            given = [x[0] for x in self.tiles.pack(*(x[None] for x in given))]
        wide = [torch.nn.functional.pad(x, (0, self.codec.head_dim - x.shape[-1])) for x in given]
        ops.encode(*wide, self.codec, page, first, backend=self.backend)
        table = PageTable(page, first[None], torch.tensor([PAGE], dtype=torch.int32), PAGE)
        k, v = ops.decode_pages(self.codec, table, backend=self.backend)
        if self.tiles is not None:
            k, v = self.tiles.unpack(k, v)
            return k[0], v[0]
        return k[0][..., : given[0].shape[-1]], v[0][..., : given[1].shape[-1]]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for row, start in enumerate(self.start or []):
            kept = max(0, self.get_seq_length() - start - self.spec.sinks)
            self.pages[row] = min(self.pages[row], kept // PAGE)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.start = [(self.start or [])[i] for i in beam_idx.tolist()]
        self.pages = [self.pages[i] for i in beam_idx.tolist()]


def slow_cache(
    config: Any, spec: CodecSpec, start: list[int] | None = None, backend: str = "reference", like: Cache | None = None
) -> Cache:
    """A cache whose stock full-attention layers are slow ones; `start` is the left padding of each row, `like` a used
    `ForgeCache` whose layers say their codecs and tiles."""
    layers: list[Any] = DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            used: Any = None if like is None else like.layers[i]
            codec = None if getattr(used, "cache", None) is None else used.cache.codec
            layers[i] = SlowLayer(spec, start, backend, getattr(used, "tiles", None), codec)
    return Cache(layers=layers)


def model(kind: str = "llama", **changes: Any) -> Any:
    """Random weights, large enough for predictions that differ from token to token."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="forge").eval().requires_grad_(False)
