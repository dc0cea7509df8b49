import numpy as np
import pytest
from tolerances import METAL_ENCODE

from forgeattention import reference
from forgeattention.backends.metal import pages as metal_pages
from forgeattention.codec import packing
from forgeattention.codec.codec import Codec
from forgeattention.codec.spec import SCALE_RULES, CodecSpec
from forgeattention.reference.pages import decode_page

from .cases import FORMATS, HEAD_DIMS, Emulator, make_codec


def keys_and_values(rng, codec, pages=1):
    """Keys with a strong mean, and values; the tokens differ in size, and one is zero."""
    shape = (codec.kv_heads, 64 * pages, codec.head_dim)
    k, v = rng.standard_normal((2, *shape)) * rng.uniform(0.2, 4, (2, codec.kv_heads, 64 * pages, 1))
    k += 3 * rng.standard_normal((codec.kv_heads, 1, codec.head_dim))
    v[:, 5] = 0
    return k.astype(np.float32), v.astype(np.float32)


def encode(k, v, codec, base=0, slack=0):
    pages = k.shape[1] // 64
    out = np.full(base + pages * codec.page_bytes + slack, 7, np.uint8)
    offsets = base + codec.page_bytes * np.arange(pages, dtype=np.int64)[::-1]
    metal_pages.encode(k, v, codec, out, offsets.copy(), Emulator())
    assert (out[:base] == 7).all()
    assert (out[base + pages * codec.page_bytes :] == 7).all()
    return out[base : base + pages * codec.page_bytes].reshape(pages, codec.kv_heads, -1)[::-1]


def check(rng, codec, pages=1):
    """The records decode to the vectors as well as the oracle's, and differ from those in few codes: only where float32
    rounds across a threshold, or where two paths of a trellis are equally good."""
    k, v = keys_and_values(rng, codec, pages)
    ours, theirs = encode(k, v, codec), reference.encode(k, v, codec)
    fmt = codec.format
    for page in range(pages):
        for head in range(codec.kv_heads):
            a, b = (packing.split_record(r[page, head], fmt) for r in (ours, theirs))
            assert np.abs(a["mean"].astype(int) - b["mean"].astype(int)).max() <= 2
            assert packing.unpack_header(a["mean"]) == packing.unpack_header(b["mean"])
            for side, code in (("k", fmt.k_code), ("v", fmt.v_code)):
                for part in (side, f"{side}_scales"):
                    share = (a[part] != b[part]).mean()
                    kind = "trellis" if code != "scalar" else code
                    assert share <= METAL_ENCODE["differing_scales" if "scales" in part else f"differing_bytes_{kind}"]
            want = [x[head, 64 * page :][:64].astype(np.float64) for x in (k, v)]
            transforms = (codec.k_transform, codec.v_transform)
            errors = []
            for record in (ours, theirs):
                stored = decode_page(record[page, head], codec)
                back = [
                    (y @ t.inverse[head % len(t.inverse)].T)[:, : codec.head_dim]
                    + (0 if t.mu is None else t.mu[head % len(t.mu), : codec.head_dim])
                    for y, t in zip(stored, transforms)
                ]
                errors.append([((x - w) ** 2).sum() for x, w in zip(back, want)])
            for mine, oracle in zip(*errors):
                assert mine <= oracle * (1 + METAL_ENCODE["squared_error"])
    return k, v, ours


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats(fmt):
    check(np.random.default_rng(1), make_codec(fmt))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[4]], ids=str)
def test_head_dims(fmt, head_dim):
    check(np.random.default_rng(2), make_codec(fmt, head_dim, kv_heads=1))


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("key_mean", [True, False])
def test_scale_rules(rule, key_mean):
    spec = CodecSpec(
        k_code="scalar", k_scale_rule=rule, v_scale_rule=rule, key_mean=key_mean, scales="log8", refine=False
    )
    check(np.random.default_rng(3), Codec(spec, 64, 1))


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize(
    ("k_code", "v_code", "head_dim"),
    [("scalar", "scalar", 64), ("trellis8", "trellis4", 64), ("trellis4", "scalar", 80), ("trellis4", "scalar", 128)],
)
def test_refinement(k_code, v_code, head_dim, rule):
    """Near-ties between two multipliers may fall otherwise than in the oracle, and then many codes differ: the error
    counts."""
    error = {}
    for refine in (False, True):
        kwargs = {"k_code": k_code, "v_code": v_code, "k_scale_rule": rule, "v_scale_rule": rule, "refine": refine}
        codec = Codec(CodecSpec(**kwargs), head_dim, 1)
        k, v = keys_and_values(np.random.default_rng(10), codec)
        for name, record in (("ours", encode(k, v, codec)), ("oracle", reference.encode(k, v, codec))):
            for side, y, x, t in zip(
                "kv", decode_page(record[0, 0], codec), (k, v), (codec.k_transform, codec.v_transform)
            ):
                want = x[0].astype(np.float64) @ t.forward[0, :, :head_dim].T
                error[name, side, refine] = ((y - want) ** 2).sum() / (want**2).sum()
                if side == "k":
                    error[name, side, refine] *= (want**2).sum() / ((want - want.mean(0)) ** 2).sum()
    for side in "kv":
        assert error["ours", side, True] < error["ours", side, False]
        assert abs(error["ours", side, True] / error["oracle", side, True] - 1) < METAL_ENCODE["refined_error"]


@pytest.mark.parametrize(
    ("k_code", "head_dim", "heads", "refine"),
    [("scalar", 64, 2, True), ("scalar", 80, 1, False), ("trellis4", 80, 1, True), ("trellis8", 64, 2, True),
     ("trellis8", 128, 1, True), ("trellis8", 256, 1, False)],
)  # fmt: skip
def test_shaped_keys(k_code, head_dim, heads, refine):
    """Near-ties change all that follows in a token, so that the error counts: that which the Gram's queries see."""
    rng = np.random.default_rng(12)
    axes = rng.standard_normal((heads, head_dim, head_dim)) * np.geomspace(3, 0.3, head_dim)
    gram = axes @ axes.transpose(0, 2, 1)
    spec = CodecSpec(k_code=k_code, v_code="scalar", refine=refine)
    codec, plain = Codec(spec, head_dim, heads, query_gram=gram), Codec(spec, head_dim, heads)
    k, v = keys_and_values(rng, codec)

    def seen(record):
        y = np.stack([decode_page(record[0, head], codec)[0] for head in range(heads)])
        e = (y @ codec.k_transform.inverse.transpose(0, 2, 1))[..., :head_dim] - k
        return np.einsum("htc,hcd,htd->", e, gram, e)

    ours, oracle = (seen(record) for record in (encode(k, v, codec), reference.encode(k, v, codec)))
    assert ours < (1 + METAL_ENCODE["shaped_error"]) * oracle
    assert ours < 0.9 * seen(reference.encode(k, v, plain))


def test_log8_exponents():
    """Over enough pages that some exponents lie at their borders."""
    codec = make_codec((2, "scalar", 2, "scalar", "log8"))
    k, v = keys_and_values(np.random.default_rng(8), codec, 40)
    k *= np.repeat(np.linspace(1, 2, 40), 64)[None, :, None]
    for ours, theirs in zip(encode(k, v, codec).reshape(80, -1), reference.encode(k, v, codec).reshape(80, -1)):
        rows = [packing.split_record(r, codec.format)["mean"] for r in (ours, theirs)]
        assert packing.unpack_header(rows[0]) == packing.unpack_header(rows[1])


def test_means_near_the_end_of_fp16():
    """The step of the mean row is rounded far up or down there; the row must not overflow."""
    codec = make_codec(kv_heads=1)
    for size in np.geomspace(3e-6, 1e-5, 20):
        k = (size * (1 + 0.1 * np.random.default_rng(9).standard_normal((1, 64, 64)))).astype(np.float32)
        y, _ = decode_page(encode(k, k, codec)[0, 0], codec)
        want = k[0] @ codec.k_transform.forward[0].T
        assert np.abs(y - want).max() < 0.1 * np.abs(want).max()


def test_several_pages_at_given_offsets():
    rng = np.random.default_rng(4)
    codec = make_codec()
    k, v, records = check(rng, codec, pages=3)
    assert (encode(k, v, codec, base=160, slack=48) == records).all()
    assert (encode(k.astype(np.float16), v.astype(np.float16), codec) != records).mean() < 0.05


def test_centred_and_custom():
    rng = np.random.default_rng(5)
    check(rng, make_codec(k_mu=rng.standard_normal((2, 64)), v_mu=rng.standard_normal(64)))
    matrices = rng.standard_normal((2, 2, 64, 64)) / 8 + 2 * np.eye(64)
    spec = CodecSpec(k_code="scalar", rotation="custom", scales="fp16", refine=False)
    check(rng, Codec(spec, 64, 2, k_matrix=matrices[0], v_matrix=matrices[1]))


@pytest.mark.parametrize("scales", ["fp16", "log8"])
def test_zero_page(scales):
    codec = make_codec((3, "scalar", 3, "scalar", scales))
    zero = np.zeros((2, 64, 64), np.float32)
    for record in encode(zero, zero, codec).reshape(2, -1):
        for y in decode_page(record, codec):
            assert (y == 0).all()


@pytest.mark.parametrize(
    ("value", "match"),
    [(np.nan, "expected finite k and v; got NaN"), (np.inf, "expected finite"), (1e9, "expected vectors that fp16")],
)
@pytest.mark.parametrize("side", [0, 1])
def test_bad_values_write_nothing(value, match, side):
    codec = make_codec()
    kv = keys_and_values(np.random.default_rng(6), codec, 2)
    kv[side][1, 70, 3] = value
    out = np.full(2 * codec.page_bytes, 7, np.uint8)
    with pytest.raises(ValueError, match=match):
        metal_pages.encode(*kv, codec, out, np.array([0, codec.page_bytes]), Emulator())
    assert (out == 7).all()


def test_offsets_outside_the_array():
    codec = make_codec()
    k, v = keys_and_values(np.random.default_rng(7), codec)
    with pytest.raises(ValueError, match="expected offsets within"):
        metal_pages.encode(k, v, codec, np.zeros(codec.page_bytes, np.uint8), np.array([16]), Emulator())
