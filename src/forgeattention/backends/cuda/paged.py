"""A paged engine's step on CUDA: tables, new tokens, pages that fill, attention, all from the device's block tables.

The engine owns the memory: vLLM's KV blocks hold pages and exact tokens (integrations/vllm). Nothing here allocates,
copies to the host or waits, so that a whole step can be captured in a CUDA graph and replayed with other tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_name, dtype_of
from ...ops.page_tables import Blocks, Geometry, fills
from ...ops.table import PageTable
from . import nvrtc, pages, params, plans
from .attention import LOG2E, DecodeLaunch
from .encoder import encode_plan
from .launch import address, constants_of, current_stream, limits, on_device
from .pages import decode_pages_into

__all__ = [
    "LayerEncoder",
    "Scratch",
    "Tables",
    "append",
    "decode_attention",
    "decode_pages_into",
    "kernels",
    "prepare",
    "scratch_sizes",
    "start_compiling",
]

_pack_page_tables = params.PAGE_TABLES.packer()
_pack_append = params.PAGED_APPEND.packer()
_pack_encode_layers = params.ENCODE_LAYERS.packer()


class Tables:
    """As `ops.page_tables.PageTables`, in memory that is allocated once (kernels/cuda/page_tables.cu).

    Args:
        geometry: of the blocks.
        rows: most rows of a step.
        tokens: most new tokens of a step.
        length: most tokens of a sequence.
        decode_tokens: most new tokens of a row whose new tokens are attended through the exact blocks.
        device: where the tables lie.
    """

    def __init__(
        self, geometry: Geometry, rows: int, tokens: int, length: int, decode_tokens: int, device: Any
    ) -> None:
        self.geometry = geometry
        most_blocks = geometry.sink_blocks + -(-geometry.most_exact(decode_tokens) // geometry.exact_block) + 1
        self.page_table = torch.zeros(rows, max(1, length // PAGE), dtype=torch.int64, device=device)
        self.packed = torch.zeros(rows, dtype=torch.int32, device=device)
        self.blocks = torch.zeros(rows, most_blocks, dtype=torch.int32, device=device)
        self.exact = torch.zeros(rows, dtype=torch.int32, device=device)
        self.fill_offsets = torch.zeros(fills(rows, tokens), dtype=torch.int64, device=device)
        self.filled = torch.zeros(fills(rows, tokens), dtype=torch.int32, device=device)
        self.fills = torch.zeros(1, dtype=torch.int32, device=device)
        self.fill_tokens = torch.zeros(fills(rows, tokens), PAGE, dtype=torch.int32, device=device)

    def make(
        self,
        starts: Any,
        lengths: Any,
        packed_table: Any,
        exact_table: Any,
        decode_rows: int,
        fill_exact: bool = False,
    ) -> None:
        """Fills the tables of a step.

        Args:
            starts: int32 [rows + 1], where each row's new tokens start among the step's.
            lengths: int32 [rows], tokens of each row, the new ones included.
            packed_table, exact_table: int32 [rows, most blocks], block numbers; 0 where there is none.
            decode_rows: the first rows, whose exact tokens are to include the new ones.
            fill_exact: all rows decode and their pages are encoded by `encode_layers`: name the tokens of filled pages
                by their exact blocks alone.
        """
        g, device = self.geometry, lengths.device
        with on_device(device):
            packed = _pack_page_tables(
                starts=starts.data_ptr(),
                lengths=lengths.data_ptr(),
                packed_table=packed_table.data_ptr(),
                exact_table=exact_table.data_ptr(),
                page_table=self.page_table.data_ptr(),
                packed=self.packed.data_ptr(),
                blocks=self.blocks.data_ptr(),
                exact=self.exact.data_ptr(),
                fill_offsets=self.fill_offsets.data_ptr(),
                filled=self.filled.data_ptr(),
                fills=self.fills.data_ptr(),
                fill_tokens=self.fill_tokens.data_ptr(),
                block_bytes=g.block_bytes,
                page_bytes=g.page_bytes,
                packed_stride=packed_table.stride(0),
                exact_stride=exact_table.stride(0),
                max_pages=self.page_table.stride(0),
                max_blocks=self.blocks.stride(0),
                decode_rows=decode_rows,
                window=g.window,
                pages_per_block=g.pages_per_block,
                exact_block=g.exact_block,
                sink_blocks=g.sink_blocks,
                fill_exact=fill_exact,
            )
            self.fills.zero_()
            kernel = nvrtc.kernel("page_tables", (), device.index, 0)
            kernel.launch((lengths.shape[0], 1, 1), 128, current_stream(device), packed)


def append(blocks: Blocks, tables: Tables, key: Any, value: Any, slots: Any, count: int, staging: Any | None) -> None:
    """Writes new keys and values to the exact blocks, and encodes the pages that they fill.

    Args:
        blocks: of the layer.
        tables: of the step.
        key, value: [tokens, kv_heads, head_dim], rows at multiples of 16 bytes.
        slots: int64 [tokens], place of each token in the exact blocks; in block 0 or below where it is not kept.
        count: `fills` of the step.
        staging: [2, kv_heads, at least 64 * count, head_dim] of the tokens' dtype, for the filled pages' keys and
            values; None to leave these pages to `encode_layers`.
    """
    tokens, heads, dim = key.shape
    size, cache = key.element_size(), blocks.tokens
    device = key.device
    with on_device(device):
        packed = _pack_append(
            k=key.data_ptr(),
            v=value.data_ptr(),
            cache=cache.data_ptr(),
            slots=slots.data_ptr(),
            fill_offsets=tables.fill_offsets.data_ptr(),
            fill_tokens=tables.fill_tokens.data_ptr(),
            fill_k=0 if staging is None else staging[0].data_ptr(),
            fill_v=0 if staging is None else staging[1].data_ptr(),
            k_stride=[size * s for s in key.stride()[:2]],
            v_stride=[size * s for s in value.stride()[:2]],
            cache_stride=[size * s for s in cache.stride()[:3]],
            fill_stride=0 if staging is None else size * staging.stride(1),
            tokens=tokens,
            heads=heads,
            words=dim * size // 16,
            exact_block=cache.shape[1],
        )
        kernel = nvrtc.kernel("paged_append", (), device.index, 0)
        items = 0 if staging is None else count * heads
        kernel.launch((-(-tokens // 4) + items, 1, 1), 256, current_stream(device), packed)
    if staging is not None:
        k, v = staging[:, :, : PAGE * count]
        pages.encode(k, v, blocks.codec, blocks.pages, tables.fill_offsets)


class LayerEncoder:
    """Encodes the pages that a step of decoding rows fills, in all layers at once (kernels/cuda/encode_layers.cu).

    Args:
        layers: blocks of every layer of a group, of one device, dtype and number of heads.
        tables: of the group, made with fill_exact.
    """

    def __init__(self, layers: Sequence[Blocks], tables: Tables) -> None:
        self.layers, self._tables = tuple(layers), tables
        first = layers[0]
        self._heads, self._device = first.codec.kv_heads, first.tokens.device
        kinds: dict[tuple[nvrtc.Macros, int], list[bytes]] = {}
        dtype = dtype_of(first.tokens)
        for each in layers:
            block, token, head = each.tokens.stride()[:3]
            keys, values = each.tokens.chunk(2, -1)
            constants = constants_of(each.codec, self._device)
            told = params.ENCODE.pack(
                k=keys.data_ptr(),
                v=values.data_ptr(),
                base=each.pages.data_ptr(),
                offsets=tables.fill_offsets.data_ptr(),
                slots=tables.fill_tokens.data_ptr(),
                bad=pages.fault_flag(self._device).data_ptr(),
                k_transform=constants.encode[0],
                v_transform=constants.encode[1],
                k_stride=(block, head, token),
                v_stride=(block, head, token),
                exact_block=each.tokens.shape[1],
                feedback=constants.feedback[0],
                feedback_stride=constants.feedback[1],
                k_unit=constants.units[0],
                v_unit=constants.units[1],
            )
            plan = encode_plan(each.codec, limits(self._device.index))
            kinds.setdefault((plan.macros(each.codec, dtype), plan.shared_bytes), []).append(told)
        with on_device(self._device):
            self._launches = [
                (nvrtc.kernel("encode_layers", macros, self._device.index, shared), len(told), self._put(told))
                for (macros, shared), told in kinds.items()
            ]

    def _put(self, told: list[bytes]) -> Any:
        return torch.frombuffer(bytearray(b"".join(told)), dtype=torch.uint8).to(self._device)

    def encode(self) -> None:
        """Encodes the pages that the tables name."""
        t, ctas = self._tables, 2 * limits(self._device.index).processors
        with on_device(self._device):
            for kernel, count, told in self._launches:
                packed = _pack_encode_layers(
                    layers=told.data_ptr(),
                    filled=t.filled.data_ptr(),
                    fills=t.fills.data_ptr(),
                    count=count,
                    kv_heads=self._heads,
                )
                kernel.launch((ctas, 1, 1), 256, current_stream(self._device), packed)


@dataclass(frozen=True)
class Scratch:
    """Memory that `decode_attention` works in, of at least `scratch_sizes`.

    Attributes:
        parts: float32.
        counters: int32, zero before and after.
        lse: float32.
    """

    parts: torch.Tensor
    counters: torch.Tensor
    lse: torch.Tensor


def scratch_sizes(
    codec: Codec, q_heads: int, rows: int, n: int, length: int, exact: int, device: Any
) -> tuple[int, int, int]:
    """Elements of a `Scratch` for at most `rows` rows of n queries, `length` packed and `exact` exact tokens."""
    plan = plans.decode_plan(codec.format, codec.kv_heads, q_heads // codec.kv_heads * n, limits(device.index))
    heads = rows * codec.kv_heads * plan.query_tiles
    parts = heads * plan.partials(length, exact) * plan.query_tile
    return parts * (codec.format.padded_dim + 2), heads, rows * q_heads * n


def _decode_launch(codec: Codec, q_heads: int, n: int, dtype: torch.dtype, tokens: torch.Tensor) -> DecodeLaunch:
    """The launch of decode attention for n queries of a row, made once."""
    device, exact_block = tokens.device, tokens.shape[1]
    constants = constants_of(codec, device)

    def make() -> DecodeLaunch:
        dtypes = str(dtype).removeprefix("torch."), dtype_of(tokens)
        return DecodeLaunch(codec, constants, q_heads // codec.kv_heads, n, dtypes, device.index, exact_block)

    return constants.launch(("decode_attention", q_heads, n, dtype, tokens.dtype, exact_block), make)


def kernels(
    codec: Codec, q_heads: int, decode_tokens: Iterable[int], dtype: str, exact_block: int, limits: plans.Limits
) -> list[tuple[str, nvrtc.Macros, int]]:
    """Every kernel that steps of a layer launch: stem, macros and bytes of shared memory. Needs no GPU.

    Args:
        codec: of the layer.
        q_heads: query heads.
        decode_tokens: numbers of new tokens that rows which decode may have.
        dtype: of queries and of exact tokens.
        exact_block: tokens of an exact block.
        limits: what the device offers.
    """
    encode, group = encode_plan(codec, limits), q_heads // codec.kv_heads
    decode = [plans.decode_plan(codec.format, codec.kv_heads, group * n, limits) for n in sorted(set(decode_tokens))]
    encode_macros = encode.macros(codec, dtype)
    return [
        # The slowest to compile come first.
        ("encode_layers", encode_macros, encode.shared_bytes),
        ("encode", encode_macros, encode.shared_bytes),
        *(("decode_attention", p.macros(codec, dtype, dtype, exact_block), p.shared_bytes) for p in decode),
        (
            "decode_pages",
            plans.decode_pages_macros(codec, dtype, False),
            plans.decode_pages_layout(codec.format).bytes,
        ),
        ("page_tables", (), 0),
        ("paged_append", (), 0),
    ]


def start_compiling(
    codec: Codec, q_heads: int, decode_tokens: Iterable[int], dtype: Any, exact_block: int, device: Any
) -> list[tuple[str, nvrtc.Macros, int]]:
    """Begins to compile the kernels of a layer's steps, in threads, so that `prepare` finds them done.

    Args:
        codec, q_heads, decode_tokens, exact_block: as for `kernels`.
        dtype: torch's, of queries and of exact tokens.
        device: where they will run.

    Returns:
        What `kernels` gives.
    """
    needed = kernels(codec, q_heads, decode_tokens, dtype_name(dtype), exact_block, limits(device.index))
    nvrtc.start([each[:2] for each in needed], nvrtc.architecture_of(device))
    return needed


def prepare(blocks: Blocks, q_heads: int, decode_tokens: Iterable[int]) -> None:
    """Compiles, or reads from disk, every kernel that steps of a layer launch, so that none waits for it later.

    Args:
        blocks: of the layer.
        q_heads: query heads.
        decode_tokens: numbers of new tokens that rows which decode may have.
    """
    codec, tokens = blocks.codec, blocks.tokens
    device, decode_tokens = tokens.device, set(decode_tokens)
    with on_device(device):
        needed = start_compiling(codec, q_heads, decode_tokens, tokens.dtype, tokens.shape[1], device)
        for stem, macros, shared_bytes in needed:
            nvrtc.kernel(stem, macros, device.index, shared_bytes)
        for n in decode_tokens:
            _decode_launch(codec, q_heads, n, tokens.dtype, tokens)
        # A first launch of these two uploads what they read of the codec; it encodes and decodes no page.
        none = torch.full((1,), -1, dtype=torch.int64, device=device)
        page = torch.zeros(codec.kv_heads, PAGE, tokens.shape[3] // 2, dtype=tokens.dtype, device=device)
        pages.encode(page, page, codec, blocks.pages, none)
        table = PageTable(blocks.pages, none[:, None], torch.zeros(1, dtype=torch.int32, device=device), PAGE)
        decode_pages_into(codec, table, page[None], page[None].clone())


def decode_attention(
    q: Any,
    blocks: Blocks,
    tables: Tables,
    scale: float,
    sink_logits: Any | None,
    max_length: int,
    out: Any,
    scratch: Scratch,
) -> None:
    """Attends the newest queries of every row, causally, to the row's pages and exact tokens.

    Args:
        q: [rows, q_heads, n, head_dim].
        blocks: of the layer.
        tables: of the step, whose first rows these are.
        scale: softmax scale.
        sink_logits: float32 [q_heads], or None.
        max_length: packed tokens that no row exceeds.
        out: as q.
        scratch: of the size for these rows, queries and lengths.
    """
    rows, q_heads, n, dim = q.shape
    codec, device = blocks.codec, q.device
    keys, values = blocks.tokens[..., :dim], blocks.tokens[..., dim:]
    with on_device(device):
        launch = _decode_launch(codec, q_heads, n, q.dtype, blocks.tokens)
        partial_count = launch.plan.partials(max_length, tables.geometry.most_exact(n))
        parts = rows * codec.kv_heads * launch.plan.query_tiles * partial_count * launch.plan.query_tile
        part = scratch.parts.data_ptr()
        block, token, head = keys.stride()[:3]
        packed = launch.pack(
            q=q.data_ptr(),
            base=blocks.pages.data_ptr(),
            page_table=tables.page_table.data_ptr(),
            lengths=tables.packed.data_ptr(),
            exact_k=keys.data_ptr(),
            exact_v=values.data_ptr(),
            exact_lengths=tables.exact.data_ptr(),
            exact_blocks=tables.blocks.data_ptr(),
            sink_logits=address(sink_logits),
            out=out.data_ptr(),
            lse=scratch.lse.data_ptr(),
            part=part,
            part_ml=part + 4 * parts * launch.width,
            counter=scratch.counters.data_ptr(),
            q_stride=q.stride()[:3],
            k_stride=(block, head, token),
            v_stride=(block, head, token),
            out_stride=out.stride()[:3],
            max_pages=tables.page_table.stride(0),
            exact_stride=tables.blocks.stride(0),
            causal=True,
            partials=partial_count,
            max_length=max_length,
            scale_log2=scale * LOG2E,
        )
        launch.kernel.launch(
            launch.plan.grid(rows, codec.kv_heads, max_length), launch.threads, current_stream(device), packed
        )
