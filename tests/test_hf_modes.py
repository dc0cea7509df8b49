"""The ways in which transformers runs a model, with a ForgeCache whose tokens are all exact against its own cache: the
same tokens and logits, or the same refusal."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from families import config_of
from hf_slow import model
from tolerances import HF
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, pipeline

from forgeattention import CodecSpec
from forgeattention.integrations.hf.cache import ForgeCache

EXACT = CodecSpec(window=4096)
N = 40
MIXED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "gemma3_text": MIXED, "lfm2": {}, "doge": {}}
"""Plain, with biases, with sliding windows, with convolutions, and read by decoding."""

Run = Callable[[Any, Callable[[], Any]], torch.Tensor]
MODES: dict[str, Run] = {}


def mode(run: Run) -> Run:
    MODES[run.__name__] = run
    return run


def made(kind: str) -> Any:
    if kind in ("lfm2", "doge"):
        torch.manual_seed(0)
        config = config_of(next(k for k in MODEL_FOR_CAUSAL_LM_MAPPING if k.model_type == kind))
        built = AutoModelForCausalLM.from_config(config, attn_implementation="forge").eval().requires_grad_(False)
        built.generation_config.eos_token_id = None
        return built
    return model(kind, **KINDS[kind])


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def tokens(rows: int = 2, n: int = N) -> torch.Tensor:
    return torch.randint(3, 90, (rows, n), generator=torch.Generator().manual_seed(n))


def padded(left: int = 9) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[0, :left] = 0
    return {"input_ids": tokens() * mask, "attention_mask": mask}


def generate(m: Any, cache: Any, inputs: Any = None, **options: Any) -> torch.Tensor:
    torch.manual_seed(1)
    given = {"input_ids": tokens()} if inputs is None else inputs
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    return m.generate(**given, past_key_values=cache, **options)


@mode
def greedy(m: Any, new: Any) -> torch.Tensor:
    return generate(m, new())


@mode
def left_padding(m: Any, new: Any) -> torch.Tensor:
    return generate(m, new(), padded())


@mode
def beams(m: Any, new: Any) -> torch.Tensor:
    return generate(m, new(), padded(), num_beams=3, num_return_sequences=2)


@mode
def several_samples(m: Any, new: Any) -> torch.Tensor:
    return generate(m, new(), padded(), do_sample=True, num_return_sequences=3)


@mode
def prompt_lookup(m: Any, new: Any) -> torch.Tensor:
    return generate(m, new(), {"input_ids": tokens(1, 12).repeat(1, 3)}, prompt_lookup_num_tokens=3)


@mode
def assisted(m: Any, new: Any) -> torch.Tensor:
    return generate(m, new(), {"input_ids": tokens(1)}, assistant_model=made(m.config.model_type))


@mode
def chunked_prefill(m: Any, new: Any) -> torch.Tensor:
    return generate(m, new(), padded(), prefill_chunk_size=11)


@mode
def second_turn(m: Any, new: Any) -> torch.Tensor:
    cache = new()
    first = generate(m, cache)
    return generate(m, cache, {"input_ids": torch.cat([first, tokens(2, 7)], 1)})


@mode
def crop(m: Any, new: Any) -> torch.Tensor:
    cache = new()
    m(tokens(), past_key_values=cache)
    cache.crop(-5)
    return m(tokens(2, 7), past_key_values=cache).logits


@mode
def deepcopy_as_a_prompt_cache(m: Any, new: Any) -> torch.Tensor:
    cache = new()
    m(tokens(), past_key_values=cache)
    each = [generate(m, copy.deepcopy(cache), {"input_ids": torch.cat([tokens(), tokens(2, n)], 1)}) for n in (3, 4)]
    return torch.cat(each, 1)


@mode
def reorder_and_select(m: Any, new: Any) -> torch.Tensor:
    cache = new()
    m(tokens(3), past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    return m(tokens(3, 6), past_key_values=cache).logits


@mode
def inputs_embeds(m: Any, new: Any) -> torch.Tensor:
    return generate(m, new(), {"inputs_embeds": m.get_input_embeddings()(tokens())})


@mode
def given_positions(m: Any, new: Any) -> torch.Tensor:
    cache, at = new(), torch.arange(N) * 2 + 3
    first = m(tokens()[:, :30], position_ids=at[None, :30].expand(2, -1), past_key_values=cache).logits
    last = m(tokens()[:, 30:], position_ids=at[None, 30:].expand(2, -1), past_key_values=cache).logits
    return torch.cat([first, last], 1)


@mode
def masks_of_four_axes(m: Any, new: Any) -> torch.Tensor:
    real = padded()["attention_mask"].bool()
    shown = torch.ones(N, N, dtype=torch.bool).tril() & real[:, None, None]
    shown[0, 0, :9, :9] |= torch.eye(9, dtype=torch.bool)
    mask, near = (torch.zeros(2, 1, N, N) for _ in range(2))
    mask = mask.masked_fill(~shown, torch.finfo(torch.float32).min)
    near = mask.masked_fill(torch.ones(N, N, dtype=torch.bool).tril(-16), torch.finfo(torch.float32).min)
    kinds = {"full_attention": mask, "sliding_attention": near}
    given = kinds if m.config.model_type == "gemma3_text" else mask
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    out = m(tokens(), attention_mask=given, position_ids=positions, past_key_values=new()).logits
    return out[real]


@mode
def streamer(m: Any, new: Any) -> torch.Tensor:
    class Kept(list):
        def put(self, value: torch.Tensor) -> None:
            self.append(value.reshape(-1))

        def end(self) -> None: ...

    kept = Kept()
    whole = generate(m, new(), {"input_ids": tokens(1)}, streamer=kept)
    assert torch.cat(kept).tolist() == whole[0].tolist()
    return whole


@mode
def two_threads(m: Any, new: Any) -> torch.Tensor:
    caches = [new(), new()]
    inputs = [{"input_ids": tokens()}, {"input_ids": tokens().flip(1)}]
    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(lambda pair: generate(m, *pair), zip(caches, inputs))), 1)


@mode
def inference_mode(m: Any, new: Any) -> torch.Tensor:
    with torch.inference_mode():
        return generate(m, new()).clone()


def outcome(run: Run, m: Any, new: Callable[[], Any]) -> torch.Tensor | str:
    try:
        with torch.no_grad():
            return run(m, new)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def compare(run: Run, m: Any) -> None:
    found = outcome(run, m, lambda: ForgeCache(m, EXACT))
    m.set_attn_implementation("eager")
    try:
        expected = outcome(run, m, lambda: DynamicCache(config=m.config))
    finally:
        m.set_attn_implementation("forge")
    if isinstance(found, str) or isinstance(expected, str):
        assert isinstance(expected, str), found  # nothing is refused that transformers' own cache does
        assert isinstance(found, str)
    elif expected.dtype == torch.int64:
        assert found.tolist() == expected.tolist()
    else:
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < (HF["same_values"] if expected.dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("name", MODES)
def test_mode(built: Any, name: str) -> None:
    compare(MODES[name], built)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(built: Any, dtype: torch.dtype) -> None:
    def logits(m: Any, new: Any) -> torch.Tensor:
        cache = new()
        return torch.cat(
            [m(tokens()[:, a:b], past_key_values=cache).logits for a, b in ((0, 30), (30, 31), (31, N))], 1
        )

    compare(logits, copy.deepcopy(built).to(dtype))


def test_lora(built: Any) -> None:
    own = copy.deepcopy(built)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    compare(MODES["left_padding"], peft.get_peft_model(own, config).eval())


def test_prefix_tuning_is_refused(built: Any) -> None:
    """Its keys come from no token: they are put into a cache of its own, in the place of an empty one."""
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", num_layers=2, token_dim=128)
    tuned = peft.get_peft_model(copy.deepcopy(built), prefix).eval()
    with pytest.raises(AttributeError, match=r"\[forge_cache\] expected no prefix tuning, which fills its own cache"):
        generate(tuned, ForgeCache(built, EXACT))


def test_a_device_map(built: Any) -> None:
    from accelerate import dispatch_model

    compare(MODES["left_padding"], dispatch_model(copy.deepcopy(built), {"": "cpu"}))


def test_a_pipeline(built: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(97)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2", padding_side="left")

    def write(m: Any, new: Any) -> torch.Tensor:
        run = pipeline("text-generation", model=m, tokenizer=tokenizer)
        texts = run("w5 w6 w7 w8", past_key_values=new(), max_new_tokens=8, do_sample=False)
        return torch.tensor(tokenizer(texts[0]["generated_text"])["input_ids"])

    compare(write, built)


@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_encoder_decoders_crop_and_go_on(kind: str) -> None:
    config = config_of(next(k for k in MODEL_FOR_CAUSAL_LM_MAPPING if k.model_type == kind))
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config, attn_implementation="forge").eval()

    def read(m: Any, new: Any) -> torch.Tensor:
        cache = EncoderDecoderCache(new(), DynamicCache(config=m.config))
        m(tokens(), past_key_values=cache)
        cache.self_attention_cache.crop(-5)  # that of the pair wants two caches of transformers' own kind
        return m(tokens(2, 7), past_key_values=cache).logits

    compare(read, built)


def test_the_contract_of_a_cache(built: Any) -> None:
    """What transformers asks of a cache beside its tokens."""
    cache, stock = ForgeCache(built, EXACT), DynamicCache(config=built.config)
    assert not cache.is_initialized
    with torch.no_grad():
        built(tokens(), past_key_values=cache)
        built.set_attn_implementation("eager")
        built(tokens(), past_key_values=stock)
        built.set_attn_implementation("forge")
    assert cache.is_initialized
    for name in ("is_compileable", "is_croppable", "is_sliding", "is_linear", "is_dummy"):
        assert getattr(cache, name) == getattr(stock, name), name
    assert (len(cache), cache.get_max_length()) == (len(stock), stock.get_max_length())
    for i in cache.coded:
        assert cache.get_seq_length(i) == stock.get_seq_length(i) == cache.get_query_offset(i) == N
        assert tuple(map(int, cache.get_mask_sizes(3, i))) == stock.get_mask_sizes(3, i)
        with pytest.raises(ValueError, match=r"\[forge\] expected a cache that stays on its device; got offloading"):
            cache.layers[i].prefetch()
        with pytest.raises(ValueError, match=rf"\[forge.crop\] expected minus 0 to {N} positions; got -{N + 1}"):
            cache.layers[i].crop(-N - 1)
    with pytest.raises(TypeError, match=r"\[forge_cache\] expected ForgeCache.save"):
        pickle.dumps(cache)
    if built.config.model_type != "lfm2":  # whose stock layers cannot be iterated over
        for found, expected in zip(cache, stock, strict=True):
            for x, y in zip(found[:2], expected[:2], strict=True):
                assert float((x - y).abs().max() / y.abs().max()) < HF["same_values"]
    for i in cache.coded:  # lfm2's convolutions cannot select
        cache.layers[i].batch_select_indices(torch.tensor([], dtype=torch.int64))
    assert [cache.get_seq_length(i) for i in cache.coded] == [0] * len(cache.coded)


@pytest.mark.parametrize("spec", [EXACT, CodecSpec(sinks=3, window=12, refine=False)], ids=["exact", "packed"])
def test_iterating_gives_what_is_held(spec: CodecSpec) -> None:
    llama, ids = made("llama"), tokens(1, 200)
    cache = ForgeCache(llama, spec)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
    keys = [k for k, _, _ in cache]
    assert [tuple(k.shape) for k in keys] == [(1, 2, 200, 64)] * 2
    first, exact = keys[0], cache.layers[0].cache.exact
    assert torch.equal(first[:, :, :3], exact.k[:, :, :3])
    assert torch.equal(first[:, :, -5:], exact.k[:, :, exact.max_length - 5 : exact.max_length])
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[0, :4] = 0
    padded_rows = ForgeCache(llama, spec)
    llama(tokens(), attention_mask=mask, past_key_values=padded_rows)
    with pytest.raises(ValueError, match=r"\[cache.read\] expected rows of one length; got \[36, 40\]"):
        list(padded_rows)
