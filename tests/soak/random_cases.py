"""Random arguments of the ops: packed caches, tokens, scores, as arrays of every framework that is here."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from ops_cases import CODES, DTYPES, Case, make_case, relative

from forgeattention.codec import PAGE, Codec, CodecSpec
from forgeattention.codec.spec import ROTATIONS, SCALE_FORMATS, SCALE_RULES
from forgeattention.ops import ExactTokens, PageTable, Scores, Threshold
from forgeattention.ops.arrays import to_numpy

FRAMEWORKS = ("numpy", "torch", *(["mlx"] if importlib.util.find_spec("mlx") else []))
WORST = 3
"""The largest error of 10,000 random cases over the bound that single tests keep: keys without their mean, few bits and
flat scores come together there."""
QUIET = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True, report_multiple_bugs=False
)


def specs_with(refine: st.SearchStrategy[bool]) -> st.SearchStrategy[CodecSpec]:
    return st.builds(
        lambda k, v, **rest: CodecSpec(k_bits=k[0], k_code=k[1], v_bits=v[0], v_code=v[1], **rest),
        k=st.sampled_from(CODES),
        v=st.sampled_from(CODES),
        rotation=st.sampled_from(ROTATIONS),
        scales=st.sampled_from(SCALE_FORMATS),
        key_mean=st.booleans(),
        refine=refine,
        k_scale_rule=st.sampled_from(SCALE_RULES),
        v_scale_rule=st.sampled_from(SCALE_RULES),
    )


specs = specs_with(st.just(False))
seeds = st.integers(0, 2**32 - 1)


def turned(x: Any, framework: str) -> Any:
    """An array of the case's torch tensors in another framework. NumPy has no bfloat16."""
    if x is None or framework == "torch":
        return x
    if framework == "numpy":
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    import mlx.core as mx

    made = mx.array(to_numpy(x))
    return made.astype(mx.bfloat16) if x.dtype == torch.bfloat16 else made


def tables(case: Case, framework: str) -> tuple[PageTable, ExactTokens]:
    t, e = case.table, case.exact
    table = PageTable(*(turned(x, framework) for x in (t.base, t.page_table, t.lengths)), t.max_length)
    return table, ExactTokens(*(turned(x, framework) for x in (e.k, e.v, e.lengths)), e.max_length)


@st.composite
def cases(draw: Any, exact: int = 0) -> tuple[Case, str]:
    """A packed cache of up to three rows, some without tokens, perhaps of no rows or without queries; and a framework.

    Every row has at least `exact` exact tokens more than there are queries."""
    rows = draw(st.integers(0, 3))
    n = draw(st.integers(0, 4))
    near = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129])
    lengths = tuple(draw(st.lists(st.one_of(near, st.integers(0, 200)), min_size=rows, max_size=rows)))
    held = tuple(draw(st.lists(st.integers(n, n + 90), min_size=rows, max_size=rows)))
    case = make_case(
        draw(specs),
        draw(st.sampled_from([64, 80, 96, 128])),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 5)),
        lengths,
        held,
        n,
        draw(st.sampled_from(DTYPES)),
        draw(seeds),
        draw(st.booleans()),
    )
    case.q *= draw(st.sampled_from([1, 1, 1e-3, 0.1, 0]))
    return case, draw(st.sampled_from(FRAMEWORKS))


def close(got: Any, want: Any, bound: float) -> None:
    """Whether the largest error is within `WORST` times `bound` of the largest magnitude."""
    error = relative(to_numpy(got), to_numpy(want))
    assert error <= WORST * bound, f"an error of {error:.3g} with a bound of {WORST * bound:.3g}"


@functools.lru_cache(256)
def made_codec(spec: CodecSpec, dim: int, heads: int, centred: bool) -> Codec:
    rng = np.random.default_rng(dim)
    mu = {"k_mu": rng.standard_normal((heads, dim)), "v_mu": rng.standard_normal(dim)} if centred else {}
    if spec.rotation == "custom":
        mats = np.eye(dim) + 0.3 * rng.standard_normal((2, heads, dim, dim)) / dim**0.5
        mu |= {"k_matrix": mats[0], "v_matrix": mats[1]}
    return Codec(spec, dim, heads, **mu)


def tokens(data: Any, heads: int, n: int, dim: int) -> list[torch.Tensor]:
    """Keys and values whose norms spread over some octaves."""
    rng = np.random.default_rng(data.draw(seeds))
    norms = 2.0 ** (data.draw(st.integers(-8, 6)) + data.draw(st.floats(0, 2)) * rng.standard_normal((2, heads, n, 1)))
    x = norms * rng.standard_normal((2, heads, n, dim)) + rng.standard_normal((2, heads, 1, dim))
    dtype = getattr(torch, data.draw(st.sampled_from(DTYPES)))
    return list(torch.from_numpy(x.astype(np.float32)).to(dtype))


def lines(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Scores of very different kinds: flat, one giant, steps of a page, heavy tails, many equal ones."""
    *rows, n = shape
    kind = rng.integers(5)
    if kind == 0:
        return rng.normal(0, 1e-3, shape)
    if kind == 1:
        return np.where(np.arange(n) == rng.integers(max(n, 1)), 30.0, rng.normal(size=shape))
    if kind == 2:
        return np.repeat(rng.normal(0, 3, (*rows, -(-n // PAGE))), PAGE, -1)[..., :n]
    if kind == 3:
        return rng.standard_t(2, shape).clip(-80, 80)
    return rng.integers(-3, 4, shape).astype(float)


def in_framework(x: Scores | Threshold, framework: str) -> Any:
    return type(x)(*(turned(value, framework) for value in vars(x).values()))
