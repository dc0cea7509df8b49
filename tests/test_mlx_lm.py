"""mlx-lm's own generation, batching, speculative decoding and saved caches with packed prompt caches."""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_families import build  # noqa: E402
from mlx_lm.models import base  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_lm.tokenizer_utils import TokenizerWrapper  # noqa: E402
from mlx_models import KINDS, SPEC, flat, greedy, model, slow_prompt_cache, tokens  # noqa: E402
from tiny import tokenizer  # noqa: E402
from tolerances import MLX_MODEL  # noqa: E402

from forgeattention.codec import Codec, CodecSpec  # noqa: E402
from forgeattention.integrations import mlx as forge  # noqa: E402

NEW = 30


def packed_layers(cache: list[Any]) -> list[forge.PackedKVCache]:
    return [part for part in flat(cache) if isinstance(part, forge.PackedKVCache)]


@pytest.fixture(scope="module")
def llama() -> Any:
    return model()


@pytest.fixture
def seam() -> Any:
    with forge.patched():
        yield


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer of single bytes; the models know the first 97."""
    return TokenizerWrapper(tokenizer())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1000, 61, 7])
def test_models_compute_what_stock_layers_of_decoded_values_do(seam: Any, kind: str, chunk: int) -> None:
    made, prompt = model(kind), tokens(1, 170)[0]
    want, want_logs = greedy(made, slow_prompt_cache(made), prompt, NEW, chunk)
    cache = forge.make_prompt_cache(made, SPEC, fitted=False)
    found, logs = greedy(made, cache, prompt, NEW, chunk)
    assert np.abs(logs - want_logs).max() < MLX_MODEL
    assert found == want
    packed = packed_layers(cache)
    assert [p.offset for p in packed] == [200] * len(packed)
    assert all(p.cache.packed_lengths.tolist() == [128] for p in packed)
    kinds = {type(x) for x in stock.make_prompt_cache(made)}
    assert {type(x) for x in cache} >= kinds - {stock.KVCache}


def test_packing_is_seen_by_the_model(llama: Any, seam: Any) -> None:
    # so that the test above could fail
    prompt = tokens(1, 170)[0]
    _, exact = greedy(llama, stock.make_prompt_cache(llama), prompt, 3)
    _, packed = greedy(llama, forge.make_prompt_cache(llama, SPEC, fitted=False), prompt, 3)
    assert np.abs(exact - packed).max() > 10 * MLX_MODEL


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(seam: Any, dtype: str) -> None:
    made, prompt = model(dtype=getattr(mx, dtype)), tokens(1, 170)[0]
    exact = CodecSpec(window=4096)
    want, _ = greedy(made, stock.make_prompt_cache(made), prompt, 8)
    found, _ = greedy(made, forge.make_prompt_cache(made, exact), prompt, 8)
    assert found == want
    cache = forge.make_prompt_cache(made, SPEC, fitted=False)
    greedy(made, cache, prompt, 8)
    assert cache[0].cache.dtype == dtype


def test_stream_generate_and_generate(llama: Any, words: Any, seam: Any) -> None:
    prompt = tokens(1, 170)[0]
    cache = slow_prompt_cache(llama)
    want = [r.token for r in mlx_lm.stream_generate(llama, words, prompt, max_tokens=NEW, prompt_cache=cache)]
    cache = forge.make_prompt_cache(llama, SPEC, fitted=False)
    found = [r.token for r in mlx_lm.stream_generate(llama, words, prompt, max_tokens=NEW, prompt_cache=cache)]
    assert found == want
    assert len(set(found)) > 8
    text = mlx_lm.generate(
        llama,
        words,
        prompt,
        max_tokens=NEW,
        prompt_cache=forge.make_prompt_cache(llama, SPEC, fitted=False),
        prefill_step_size=50,
    )
    slow = mlx_lm.generate(
        llama, words, prompt, max_tokens=NEW, prompt_cache=slow_prompt_cache(llama), prefill_step_size=50
    )
    assert text == slow


def test_a_second_turn_goes_on_in_the_same_cache(llama: Any, words: Any, seam: Any) -> None:
    first, second = tokens(2, 90)
    caches = forge.make_prompt_cache(llama, SPEC, fitted=False), slow_prompt_cache(llama)
    for turn in (first, second):
        texts = [mlx_lm.generate(llama, words, turn, max_tokens=9, prompt_cache=cache) for cache in caches]
        assert texts[0] == texts[1]
    assert caches[0][0].cache.packed_lengths[0] > 64


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_speculative_decoding(seam: Any, words: Any, kind: str) -> None:
    window = {"sliding_window": 1000} if kind == "gemma3_text" else {}
    made, draft = model(kind, **window), model(kind, num_hidden_layers=3 if window else 1, **window)
    # a page leaves with the 167th token and every 64th then, mostly in the middle of a draft
    prompt, n = tokens(1, 150)[0], 150
    cache = forge.make_prompt_cache(made, SPEC, fitted=False) + forge.make_prompt_cache(draft, SPEC, fitted=False)
    drafts: dict[str, Any] = {"draft_model": draft, "num_draft_tokens": 3, "prompt_cache": cache}
    steps = list(mlx_lm.stream_generate(made, words, prompt, max_tokens=n, **drafts))
    plain = forge.make_prompt_cache(made, SPEC, fitted=False)
    wanted = [r.token for r in mlx_lm.stream_generate(made, words, prompt, max_tokens=n, prompt_cache=plain)]
    assert [r.token for r in steps] == wanted
    assert packed_layers(plain)[0].cache.packed_lengths[0] == 256
    if kind == "gemma3_text":
        # the draft model is the model itself
        assert sum(r.from_draft for r in steps) > n // 2


def test_batch_generate_gives_each_row_what_it_gets_alone(llama: Any, words: Any, seam: Any) -> None:
    prompts = [*tokens(2, 150), *tokens(1, 40, seed=1), *tokens(1, 210, seed=2)]
    alone = []
    for prompt in prompts:
        cache = forge.make_prompt_cache(llama, SPEC, fitted=False)
        steps = mlx_lm.stream_generate(llama, words, prompt, max_tokens=20, prompt_cache=cache)
        alone.append([r.token for r in steps])
    # rows leave at different times, as some reach their own maximum
    most = [20, 3, 11, 20]
    caches = [forge.make_prompt_cache(llama, SPEC, fitted=False) for _ in prompts]
    answer = mlx_lm.batch_generate(
        llama, words, prompts, caches, max_tokens=most, return_token_ids=True, return_prompt_caches=True,
        prefill_batch_size=3, completion_batch_size=3,
    )  # fmt: skip
    assert answer.token_ids == [row[:n] for row, n in zip(alone, most)]
    for cache, prompt, n in zip(answer.caches, prompts, most):
        assert [layer.offset for layer in cache] == [len(prompt) + n] * 2
    # a returned cache goes on
    again = mlx_lm.batch_generate(
        llama, words, [[row[n]] for row, n in zip(alone[1:3], most[1:3])], answer.caches[1:3], max_tokens=5,
        return_token_ids=True,
    )  # fmt: skip
    assert again.token_ids == [row[n + 1 : n + 6] for row, n in zip(alone[1:3], most[1:3])]


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_next", "falcon_h1"])
def test_batches_of_hybrids(seam: Any, words: Any, kind: str) -> None:
    made = model(kind)
    prompts = [*tokens(1, 150), *tokens(1, 90, seed=1)]
    alone = []
    for prompt in prompts:
        cache = forge.make_prompt_cache(made, SPEC, fitted=False)
        steps = mlx_lm.stream_generate(made, words, prompt, max_tokens=12, prompt_cache=cache)
        alone.append([r.token for r in steps])
    caches = [forge.make_prompt_cache(made, SPEC, fitted=False) for _ in prompts]
    answer = mlx_lm.batch_generate(made, words, prompts, caches, max_tokens=12, return_token_ids=True)
    assert answer.token_ids == alone


def test_trim_of_sliding_windows(seam: Any) -> None:
    made = model("gpt_oss", sliding_window=300)
    cache, prompt = forge.make_prompt_cache(made, SPEC, fitted=False), tokens(1, 170)[0]
    want, _ = greedy(made, cache, prompt, 5)
    assert stock.trim_prompt_cache(cache, 6) == 6
    assert [p.offset for p in packed_layers(cache)] == [169]
    assert greedy(made, cache, prompt[-1:], 5)[0] == want
    made = model("gpt_oss")  # a window that is full by now cannot be trimmed, and then nothing is
    cache = forge.make_prompt_cache(made, SPEC, fitted=False)
    greedy(made, cache, prompt, 1)
    with pytest.raises(ValueError, match="expected layers that can go back 6 tokens; got RotatingKVCache in layer 0"):
        stock.trim_prompt_cache(cache, 6)
    assert packed_layers(cache)[0].offset == 171
    plain = stock.make_prompt_cache(made)
    greedy(made, plain, prompt, 1)
    assert stock.trim_prompt_cache(plain, 6) == 0


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1"])
def test_trim_of_recurrent_layers(seam: Any, kind: str) -> None:
    made, prompt = model(kind), tokens(1, 170)[0]
    cache = forge.make_prompt_cache(made, SPEC, fitted=False)
    greedy(made, cache, prompt, 5)
    assert not stock.can_trim_prompt_cache(cache)
    with pytest.raises(ValueError, match=r"can go back 5 tokens; got ArraysCache in layer 0: keep a copy\.deepcopy"):
        forge.trim_prompt_cache(cache, 5)
    assert all(p.offset == 175 for p in packed_layers(cache))

    cache = forge.make_prompt_cache(made, SPEC, fitted=False, snapshots=2)
    want, logs = greedy(made, cache, prompt, 5, chunk=100)
    held = sum(layer.nbytes for layer in cache)
    # neither one of the last two tokens, nor the first one after a prompt, nor the end of the prompt's two pieces
    ways = re.escape("[1, 4, 5, 75]")
    for back in (3, 74, 76, 176):
        want_text = f"can go back {back} tokens; got SnapshotCache in layer 0: its snapshots are of {ways} tokens ago"
        with pytest.raises(ValueError, match=want_text):
            stock.trim_prompt_cache(cache, back)
    assert forge.trim_prompt_cache(cache, 0) == 0
    assert stock.trim_prompt_cache(cache, 1) == 1
    assert all(p.offset == 174 for p in packed_layers(cache))
    assert forge.trim_prompt_cache(cache, 4) == 4
    assert all(p.offset == 170 for p in packed_layers(cache))
    assert sum(layer.nbytes for layer in cache) < held
    found, again = greedy(made, cache, want[:1], 4)
    assert found == want[1:]
    assert np.abs(again - logs[1:]).max() < MLX_MODEL
    assert forge.trim_prompt_cache(cache, 75) == 75  # 175 tokens again: to the first piece's end


def test_a_draft_that_cannot_go_back_is_refused(seam: Any, words: Any, llama: Any) -> None:
    draft = model("qwen3_next")
    cache = forge.make_prompt_cache(llama, SPEC, fitted=False) + forge.make_prompt_cache(draft, SPEC, fitted=False)
    steps = mlx_lm.stream_generate(
        llama, words, tokens(1, 50)[0], max_tokens=30, draft_model=draft, num_draft_tokens=3, prompt_cache=cache
    )
    with pytest.raises(ValueError, match="got ArraysCache in layer 0"):
        list(steps)


def test_the_patch_is_undone(llama: Any) -> None:
    original, maker = base.scaled_dot_product_attention, stock.make_prompt_cache
    seam = importlib.import_module("mlx_lm.models.llama")
    sys.modules.pop("mlx_lm.models.olmo2", None)
    with forge.patched(SPEC, fitted=False):
        with forge.patched():
            assert seam.scaled_dot_product_attention is base.scaled_dot_product_attention is not original
        assert seam.scaled_dot_product_attention is not original
        late = importlib.import_module("mlx_lm.models.olmo2")
        assert late.scaled_dot_product_attention is not original
        assert mlx_lm.generate.__globals__["make_prompt_cache"] is stock.make_prompt_cache is not maker
        assert stock.PackedKVCache is forge.PackedKVCache
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        assert names.get("scaled_dot_product_attention", original).__module__ == original.__module__ or not str(
            names.get("__name__")
        ).startswith("mlx_lm")
    assert seam.scaled_dot_product_attention is late.scaled_dot_product_attention is original
    assert stock.make_prompt_cache is mlx_lm.generate.__globals__["make_prompt_cache"] is maker
    assert not hasattr(stock, "PackedKVCache")
    cache = forge.make_prompt_cache(llama, SPEC, fitted=False)
    with pytest.raises(ValueError, match=r"expected mlx-lm under integrations\.mlx\.patched"):
        llama(mx.array([[1, 2]]), cache=cache)
    with pytest.raises(RuntimeError, match="inside"), forge.patched():
        raise RuntimeError("inside")
    assert base.scaled_dot_product_attention is original


def test_with_a_spec_mlx_lm_makes_packed_caches_itself(llama: Any, words: Any) -> None:
    prompt, made = tokens(1, 170)[0], []
    with forge.patched():
        cache = forge.make_prompt_cache(llama, SPEC, fitted=False)
        want = mlx_lm.generate(llama, words, prompt, max_tokens=5, prompt_cache=cache)
    plain = mlx_lm.generate(llama, words, prompt, max_tokens=5)
    with forge.patched(SPEC, fitted=False, max_pages=3):
        assert mlx_lm.generate(llama, words, prompt, max_tokens=5) == want != plain
        made = stock.make_prompt_cache(llama)
        with pytest.raises(ValueError, match=r"\[mlx_lm\] expected no max_kv_size"):
            mlx_lm.generate(llama, words, prompt, max_tokens=5, max_kv_size=64)
    assert [layer.max_pages for layer in made] == [3, 3]
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected a spec with options"), forge.patched(max_pages=3):
        pass


def test_codecs_of_single_layers(llama: Any, seam: Any) -> None:
    wide = CodecSpec(k_bits=4, v_bits=4, refine=False, sinks=3, window=12)
    cache = forge.make_prompt_cache(llama, SPEC, codecs={1: Codec(wide, 64, 2)})
    greedy(llama, cache, tokens(1, 170)[0], 2)
    bits = [entry["bits"] for entry in forge.report(cache)["layers"]]
    assert bits == [SPEC.page_format(64).effective_bits, wide.page_format(64).effective_bits]
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected full-attention layers, \[5\] among them; got \[0, 1\]"):
        forge.make_prompt_cache(llama, SPEC, codecs={5: Codec(wide, 64, 2)})


def test_report(seam: Any) -> None:
    made = model("gemma3_text")
    cache = forge.make_prompt_cache(made, SPEC, fitted=False)
    greedy(made, cache, tokens(1, 400)[0], 1)
    report = forge.report(cache)
    assert (report["packed"], report["of"]) == (1, 3)
    assert [entry["kind"] for entry in report["layers"]] == ["RotatingKVCache", "RotatingKVCache", "packed"]
    assert [entry["positions"] for entry in report["layers"]] == [40, 40, 401]
    assert report["bytes"] == sum(layer.nbytes for layer in cache)
    assert json.dumps(report)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("own", [True, False])
def test_saved_caches_go_on_where_they_stopped(kind: str, own: bool, tmp_path: Any) -> None:
    made, prompt, path = model(kind), tokens(1, 170)[0], str(tmp_path / "cache.safetensors")
    with forge.patched():
        cache = forge.make_prompt_cache(made, SPEC, fitted=False)
        greedy(made, cache, prompt, 1)
        if own:
            forge.save_prompt_cache(path, cache, made)
            back = forge.load_prompt_cache(path, made)
        else:
            stock.save_prompt_cache(path, cache)
            back = stock.load_prompt_cache(path)
        assert [type(x) for x in back] == [type(x) for x in cache]
        want, logs = greedy(made, cache, prompt[:3], 4)
        found, again = greedy(made, back, prompt[:3], 4)
    assert found == want
    assert (logs == again).all()
    assert [f.name for f in tmp_path.iterdir()] == ["cache.safetensors"]


def test_a_damaged_or_foreign_file_is_refused(llama: Any, seam: Any, tmp_path: Any) -> None:
    path = tmp_path / "cache.safetensors"
    cache = forge.make_prompt_cache(llama, SPEC, fitted=False)
    greedy(llama, cache, tokens(1, 170)[0], 1)
    forge.save_prompt_cache(path, cache, llama)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected model"):
        forge.load_prompt_cache(path, model(seed=1))
    for at in (len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"\[mlx_lm\] expected"):
            forge.load_prompt_cache(path, llama)
    path.write_bytes(whole[: len(whole) - 100])
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected a complete prompt cache"):
        forge.load_prompt_cache(path, llama)
    stock.save_prompt_cache(str(path), cache)
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected format version"):
        forge.load_prompt_cache(path, llama)


def test_a_saved_fork_leaves_out_the_other_ones_pages(llama: Any, seam: Any, tmp_path: Any) -> None:
    import copy

    cache = forge.make_prompt_cache(llama, SPEC, fitted=False)
    greedy(llama, cache, tokens(1, 170)[0], 1)
    other = copy.deepcopy(cache)
    forge.save_prompt_cache(tmp_path / "before.safetensors", cache, llama)
    greedy(llama, other, tokens(1, 2000, seed=1)[0], 1)
    forge.save_prompt_cache(tmp_path / "after.safetensors", cache, llama)
    sizes = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("before", "after")]
    assert sizes[0] == sizes[1]


def test_no_full_attention_layer_is_an_error(words: Any, caplog: Any) -> None:
    made = build("mamba2")
    with pytest.raises(ValueError, match=r"\[mlx_lm\] expected a full-attention layer; got \[\] of 4"):
        forge.make_prompt_cache(made, SPEC, fitted=False)
    # where mlx-lm makes the cache, it makes its own, and the log says so
    want = mlx_lm.generate(made, words, tokens(1, 20)[0], max_tokens=5)
    with forge.patched(SPEC), caplog.at_level("WARNING", "forgeattention"):
        assert mlx_lm.generate(made, words, tokens(1, 20)[0], max_tokens=5) == want
    assert "mlx-lm's own caches serve this model: [mlx_lm] expected a full-attention layer" in caplog.text


def test_another_cache_beside_the_packed_one_is_refused(llama: Any, words: Any, seam: Any) -> None:
    prompt = tokens(1, 20)[0]
    for option in ({"kv_bits": 4}, {"max_kv_size": 64}):
        cache, (name, value) = forge.make_prompt_cache(llama, SPEC, fitted=False), *option.items()
        with pytest.raises(ValueError, match=rf"\[mlx_lm\] expected no {name} with a packed cache; got {value}"):
            mlx_lm.generate(llama, words, prompt, max_tokens=3, prompt_cache=cache, **option)
        assert cache[0].empty()
        with forge.patched(SPEC), pytest.raises(ValueError, match=rf"\[mlx_lm\] expected no {name}"):
            mlx_lm.generate(llama, words, prompt, max_tokens=3, **option)
        own = stock.make_prompt_cache(llama)
        mlx_lm.generate(llama, words, prompt, max_tokens=3, prompt_cache=own, **option)


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("own", [True, False])
def test_a_reply_is_taken_back_whole_and_snapshots_are_saved(
    seam: Any, words: Any, kind: str, own: bool, tmp_path: Any
) -> None:
    made, prompt, path = model(kind), tokens(1, 170)[0], str(tmp_path / "cache.safetensors")
    cache = forge.make_prompt_cache(made, SPEC, fitted=False, snapshots=2)
    first = [r.token for r in mlx_lm.stream_generate(made, words, prompt, max_tokens=9, prompt_cache=cache)]
    held = packed_layers(cache)[0].offset
    if own:
        forge.save_prompt_cache(path, cache, made)
        cache = forge.load_prompt_cache(path, made)
    else:
        stock.save_prompt_cache(path, cache)
        cache = stock.load_prompt_cache(path)
    assert stock.trim_prompt_cache(cache, held - len(prompt)) == held - len(prompt)
    assert packed_layers(cache)[0].offset == len(prompt)
    assert stock.trim_prompt_cache(cache, 1) == 1
    again = [r.token for r in mlx_lm.stream_generate(made, words, prompt[-1:], max_tokens=9, prompt_cache=cache)]
    assert again == first
