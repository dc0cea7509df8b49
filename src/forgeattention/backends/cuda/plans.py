"""Shapes of CUDA launches: tiles, splits, stages and shared memory. Nothing here needs a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from ...codec.codec import Codec
from ...codec.spec import PAGE, PageFormat
from .macros import ROTATIONS, TYPES, macros, page_macros
from .nvrtc import Macros
from .structs import SharedLayout

THRESHOLD = {"FORGE_CAPACITY": 8192, "FORGE_SHORT": 2048, "FORGE_LISTED_PAGES": 8192}
"""Lengths of sparse_threshold's lists: tokens above the bound, tokens of the last bin, pages."""
THRESHOLD_BYTES = (
    8 * (THRESHOLD["FORGE_CAPACITY"] + THRESHOLD["FORGE_SHORT"])
    + 4 * THRESHOLD["FORGE_LISTED_PAGES"]
    + (12 * 1024 + 8 * 33 + 16)
)
"""Shared memory of sparse_threshold: its three lists, its bins, what its warps exchange."""
FEW_PAGES, MOST_PAGES = 16384, 49152
"""Pages whose ranks page_select has room for in shared memory: on any device, and on those with more than 192 KB."""


def scores_warps(fmt: PageFormat) -> int:
    return 4 if fmt.padded_dim <= 256 else 2


def value_sum_shared_bytes(fmt: PageFormat) -> int:
    """A record for each warp; after the last page, the sums of eight queries in its place."""
    return scores_warps(fmt) * max(fmt.record_bytes, 8 * (fmt.padded_dim + 1) * 4)


def decode_pages_layout(fmt: PageFormat) -> SharedLayout:
    """Shared memory of decode_pages: the vectors of one side of a page, its scales."""
    return SharedLayout(y=4 * PAGE * (fmt.padded_dim + 4), scales=4 * PAGE)


def decode_pages_macros(codec: Codec, dtype: str, rotated: bool) -> Macros:
    """With `rotated`, vectors stay as they are stored."""
    extra = {"FORGE_ROTATION": ROTATIONS["none"]} if rotated else {}
    return page_macros(
        codec,
        FORGE_WIDTH=codec.format.padded_dim if rotated else codec.head_dim,
        FORGE_TYPE=TYPES[dtype],
        **extra,
        **decode_pages_layout(codec.format).macros,
    )


LIMITS = (
    "MULTIPROCESSOR_COUNT",
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
    "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
)
"""Names of the device attributes that `Limits` holds."""


@dataclass(frozen=True)
class Limits:
    """What a device offers to one launch. Defaults: H100."""

    processors: int = 132
    shared_per_block: int = 232448
    shared_per_processor: int = 233472


LIMITS_OF = {
    "sm_80": Limits(108, 166912, 167936),
    "sm_86": Limits(84, 101376, 102400),
    "sm_89": Limits(142, 101376, 102400),
    "sm_90a": Limits(),
    "sm_100": Limits(148, 232448, 233472),
    "sm_120": Limits(188, 101376, 102400),
}
"""By compile target. Shared memory follows from the architecture (CUDA C++ Programming Guide, "Technical Specifications
per Compute Capability"); the number of processors, which differs between products, decides no kernel."""


@dataclass(frozen=True)
class DecodePlan:
    """Shape of a decode launch. Fixed by the codec, the queries of a KV head and the device, never by the batch, so
    that a row's result is the same alone and in a batch."""

    query_tile: int  # queries of one KV head that a CTA holds
    query_tiles: int
    warps: int
    stage_pages: int  # pages of a stage, that a warp reads together
    stages: int  # of so many records, that a warp's ring holds
    ctas: int  # per multiprocessor
    num_splits: int  # of one row and KV head, at most
    min_pages: int  # of a split
    layout: SharedLayout

    @property
    def shared_bytes(self) -> int:
        return self.layout.bytes

    def macros(self, codec: Codec, dtype: str, exact_dtype: str, exact_block: int = 0) -> Macros:
        return page_macros(
            codec,
            FORGE_QUERIES=self.query_tile,
            FORGE_WARPS=self.warps,
            FORGE_STAGE_PAGES=self.stage_pages,
            FORGE_STAGES=self.stages,
            FORGE_CTAS=self.ctas,
            FORGE_TYPE=TYPES[dtype],
            FORGE_EXACT_TYPE=TYPES[exact_dtype],
            FORGE_EXACT_BLOCK=exact_block,
            **self.layout.macros,
        )

    def row_splits(self, length: int) -> int:
        """Splits that pages of so many tokens are cut into."""
        return max(1, min(self.num_splits, -(-length // PAGE) // self.min_pages))

    def partials(self, max_length: int, max_exact: int) -> int:
        """Partial results of a row and KV head: one per split and per task of exact tokens (Cut in decode_args.cuh)."""
        return self.row_splits(max_length) + -(-max_exact // 16)

    def grid(self, batch: int, kv_heads: int, max_length: int) -> tuple[int, int, int]:
        return self.row_splits(max_length), kv_heads * self.query_tiles, batch


def decode_layout(fmt: PageFormat, queries: int, warps: int, stage_pages: int, stages: int) -> SharedLayout:
    """Shared memory of decode_attention; what lies there is said at `Shared` in decode_args.cuh."""
    d = fmt.padded_dim
    return SharedLayout(
        ring=warps * stages * stage_pages * fmt.record_bytes,
        terms=queries * 2 * (d + 16),
        plain=queries * 4 * d,
        scales=warps * stage_pages * PAGE * 4,
        barriers=warps * stages * 16,
        constants=48,
        step=4 * queries,
        shift=4 * queries,
        size=4 * queries,
        totals=8 * queries,
        last=4,
    )


def decode_plan(
    fmt: PageFormat,
    kv_heads: int,
    queries: int,
    limits: Limits,
    warps: int | None = None,
    ctas: int | None = None,
    stage_pages: int | None = None,
    stages: int = 4,
    rounds: int = 2,
) -> DecodePlan:
    """The launch shape for `queries` query vectors per KV head (group times tokens); measured, not derived.

    To head_dim 128 two CTAs of eight warps share a multiprocessor with four queries or fewer (128 registers, two pages
    at a time), and one of twelve has it with eight (168 registers): half as many splits to join make up for the warps.
    Larger ones take 255 registers; but with four queries or fewer 16 warps of 128 are faster to head_dim 256 (28.6 us
    vs 34.3 at 8 x 32K on an H200), where a page for each fits. A split holds `rounds` stages of pages for every warp.
    Where shared memory is short, fewer CTAs share a multiprocessor, then fewer warps a CTA, then a warp reads one page
    at a time.

    Raises:
        ValueError: no shape fits.
    """
    d = fmt.padded_dim
    held = 4 if queries <= 4 else 8 if queries <= 8 or d > 128 else 16
    tiles = -(-queries // held)
    light = d <= 128 and held <= 8
    eight = light and held == 8
    warps = warps or (12 if eight else 16 if 128 < d <= 256 and held == 4 else 8)
    ctas = ctas or (2 if light and not eight else 1)
    stage_pages = stage_pages or (2 if light and held == 4 else 1)
    shapes: list[tuple[int, int, int]] = []
    for p in range(stage_pages, 0, -1):
        shapes += [(warps, c, p) for c in range(ctas, 0, -1)]
        fewer = warps
        while (fewer := fewer // 2) > 1:
            shapes.append((fewer, 1, p))
    for warps, ctas, stage_pages in shapes:
        # A warp's part of the ring holds its state at the end.
        least = -(-max(held * (4 * (d + 8) + 8), 8 * d) // (stage_pages * fmt.record_bytes))
        room = min(limits.shared_per_block, limits.shared_per_processor // ctas - 1024)
        for count in range(max(least, stages), least - 1, -1):
            layout = decode_layout(fmt, held, warps, stage_pages, count)
            if layout.bytes <= room:
                return DecodePlan(
                    query_tile=held,
                    query_tiles=tiles,
                    warps=warps,
                    stage_pages=stage_pages,
                    stages=count,
                    ctas=ctas,
                    num_splits=max(1, limits.processors * ctas // (kv_heads * tiles)),
                    min_pages=rounds * warps * stage_pages,
                    layout=layout,
                )
    raise ValueError(f"[decode_attention] expected {layout.bytes} bytes of shared memory; got {room}")


@dataclass(frozen=True)
class SparsePlan:
    """Shape of a launch of sparse_scores or sparse_attention. Fixed by the codec, the queries of a KV head and the
    device, never by the batch or its lengths.

    Attributes:
        query_tile: queries of one KV head that a CTA holds.
        query_tiles: of a KV head.
        warps, stages: of a CTA; pages that each warp has in flight.
        ctas: per multiprocessor.
        num_splits: CTAs over which the pages of one head are dealt out.
        layout: of the ring, a slot for each stage of each warp, and of its barriers.
        shared_bytes: dynamic shared memory of a CTA: the layout, or the sums that take its place at the end.
    """

    query_tile: int
    query_tiles: int
    warps: int
    stages: int
    ctas: int
    num_splits: int
    layout: SharedLayout
    shared_bytes: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def macros(self, codec: Codec, dtype: str) -> Macros:
        return page_macros(
            codec,
            FORGE_QUERIES=self.query_tile,
            FORGE_WARPS=self.warps,
            FORGE_STAGES=self.stages,
            FORGE_CTAS=self.ctas,
            FORGE_TYPE=TYPES[dtype],
            **self.layout.macros,
        )


def sparse_plan(fmt: PageFormat, kv_heads: int, queries: int, limits: Limits, keys: bool) -> SparsePlan:
    """The shape for `queries` query vectors per KV head, of sparse_scores (`keys`) or of sparse_attention."""
    d = fmt.padded_dim
    held = 4 if keys and queries <= 4 else 8
    tiles = -(-queries // held)
    warps, ctas = (8, 2) if d <= 128 else (8, 1) if d <= 256 else (4, 1)
    # Static shared memory: scales, terms of the queries, constants.
    fixed = 4 * 64 * warps + (held * (2 * (d + 16) + 16) if keys else 32) + 64
    room = min(limits.shared_per_block, limits.shared_per_processor // ctas - 1024) - fixed
    part = fmt.v_offset if keys else fmt.record_bytes - fmt.mean_offset
    stages = min(4, room // (warps * (part + 16)))
    sums = 0 if keys else warps * 8 * (d + 1) * 4
    num_splits = max(1, limits.processors * ctas // (kv_heads * tiles))
    layout = SharedLayout(ring=warps * stages * part, barriers=warps * stages * 16)
    return SparsePlan(held, tiles, warps, stages, ctas, num_splits, layout, max(layout.bytes, sums))


PAGE_SCORES_WARPS = 4


def scores_macros(codec: Codec, dtype: str) -> Macros:
    return page_macros(codec, FORGE_TYPE=TYPES[dtype], FORGE_WARPS=scores_warps(codec.format))


def page_scores_macros(codec: Codec, dtype: str) -> Macros:
    return page_macros(codec, FORGE_WARPS=PAGE_SCORES_WARPS, FORGE_TYPE=TYPES[dtype])


def threshold_macros() -> Macros:
    return macros(**THRESHOLD, FORGE_SHARED_BYTES=THRESHOLD_BYTES)
