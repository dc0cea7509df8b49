"""Calibration: which layers deserve more bits, and what their queries look like, kept in a small file per model.

Each layer's keys and values are coded alone at 3 bits while the model reads a text, and the KL divergence of its
predictions is taken as that layer's and side's sensitivity. Bits then move from where they matter
least to where they matter most, at the same total. The Gram matrices of the queries met on the way shape the errors of
keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import ops
from ..codec import PAGE, Codec, CodecSpec
from ..integrations.hf.cache import ForgeCache
from ..models.calibration import Calibration, Grams, Table, codecs_for
from ..models.fingerprint import fingerprint
from ..ops.table import PageTable
from .evaluation.streaming import attention, first_tokens, opened, spans, step, tokenise

BLOCK = 128
BITS = (2, 3, 4)
ERROR = {"k": {2: 5.0, 3: 1.0, 4: 0.4}, "v": {2: 3.0, 3: 1.0, 4: 0.28}}
"""Divergence of a layer's side by its bits, over that at 3 bits: about its codes' squared error, 2 bits a bit worse."""

Sensitivities = dict[int, tuple[float, float]]


def allocate(sensitivities: Mapping[int, tuple[float, float]], bits: float, cost: Callable[[int, int], float]) -> Table:
    """Bits of each layer for the least sum of divergences within a budget.

    Args:
        sensitivities: of each layer's keys and values, at 3 bits.
        bits: budget, mean effective bits per element.
        cost: effective bits per element of a layer by its K and V bits.

    Returns:
        K and V bits by layer.

    Raises:
        ValueError: a budget under that of 2 bits everywhere.
    """
    if cost(2, 2) > bits:
        raise ValueError(f"[calibrate] expected bits >= {cost(2, 2):.4g}; got {bits:g}")
    table = {layer: [2, 2] for layer in sensitivities}
    left = (bits - cost(2, 2)) * len(table) + 1e-9
    price = cost(3, 2) - cost(2, 2)  # one bit of one side
    while left >= price:
        gains = [
            (value * (ERROR[name][have[side]] - ERROR[name][have[side] + 1]), layer, side)
            for layer, have in table.items()
            for side, (name, value) in enumerate(zip("kv", sensitivities[layer]))
            if have[side] < BITS[-1]
        ]
        if not gains:
            break
        _, layer, side = max(gains)
        table[layer][side] += 1
        left -= price
    return {layer: (k, v) for layer, (k, v) in table.items()}


class CodedLayer(DynamicLayer):
    """A stock layer whose older tokens are coded and decoded again: what a packed layer holds, for stock attention.

    Args:
        codec: the layer's codec.
        sides: which of "k" and "v" are coded.
        backend: of `ops`; "cpu" codes tensors of other devices on the host.
    """

    def __init__(self, codec: Codec, sides: str = "kv", backend: str = "auto") -> None:
        super().__init__()
        self.codec, self.sides, self.backend = codec, sides, backend
        self.coded = codec.spec.sinks

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attention sees the new tokens exact; pages fill from the tokens before them, as in a packed cache."""
        if self.is_initialized:
            pages = (self.keys.shape[2] - self.codec.spec.window - self.coded) // PAGE
            if pages > 0:
                self._code(slice(self.coded, self.coded + PAGE * pages), pages)
                self.coded += PAGE * pages
        return super().update(key_states, value_states, *args, **kwargs)

    def _code(self, span: slice, pages: int) -> None:
        size = self.codec.page_bytes
        where = torch.device("cpu") if self.backend == "cpu" else self.keys.device
        for row in range(self.keys.shape[0]):
            at = torch.arange(pages, device=where) * size
            out = torch.empty(pages * size, dtype=torch.uint8, device=where)
            k, v = (x[row, :, span].to(where).contiguous() for x in (self.keys, self.values))
            ops.encode(k, v, self.codec, out, at, backend=self.backend)
            length = torch.tensor([PAGE * pages], dtype=torch.int32, device=where)
            table = PageTable(out, at[None], length, PAGE * pages)
            decoded = ops.decode_pages(self.codec, table, backend=self.backend)
            for name, held, x in zip("kv", (self.keys, self.values), decoded):
                if name in self.sides:
                    held[row, :, span] = x[0].to(held.device, held.dtype)


def coded_cache(model: Any, layers: Mapping[int, tuple[Codec, str]], backend: str = "auto") -> DynamicCache:
    """A stock cache in which some layers are coded: layer number -> codec and coded sides."""
    cache = DynamicCache(config=model.config)
    for number, (codec, sides) in layers.items():
        cache.layers[number] = CodedLayer(codec, sides, backend)
    return cache


@torch.no_grad()
def predictions(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Log-probabilities at the second half of the tokens ids [batch, tokens], float32 [batch, tokens - tokens // 2,
    vocabulary]."""
    first, out = ids.shape[1] // 2, []
    for start, stop in spans(ids.shape[1], BLOCK):
        keep = min(stop - first, stop - start)
        logits = step(model, ids[:, start:stop], cache, max(keep, 1))
        if keep > 0:
            out.append(logits.log_softmax(-1))
    return torch.cat(out, 1)


def measure(
    model: Any, ids: torch.Tensor, codecs: Mapping[int, Codec], on_pass: Callable[[], None] | None = None
) -> tuple[Sensitivities, Grams]:
    """Sensitivities of layers at the codecs' bits, and the Gram matrices of queries per KV head.

    Args:
        model: a transformers causal language model.
        ids: tokens to read, int64 [batch, tokens].
        codecs: of the packed layers.
        on_pass: called after each of 2 len(codecs) + 1 passes.
    """
    grams: Grams = {}
    with _queries(model, grams, {i: c.kv_heads for i, c in codecs.items()}):
        exact = predictions(model, ids, DynamicCache(config=model.config))
    report = on_pass or (lambda: None)
    report()
    found: Sensitivities = {}
    for number, codec in codecs.items():
        pair = []
        for side in "kv":
            other = predictions(model, ids, coded_cache(model, {number: (codec, side)}))
            pair.append(max(float((exact.exp() * (exact - other)).sum(-1).mean()), 0.0))
            report()
        found[number] = pair[0], pair[1]
    return found, {i: g / np.trace(g, axis1=1, axis2=2)[:, None, None] * g.shape[1] for i, g in grams.items()}


class _queries:
    """While it lasts, stock attention adds up the Gram matrices of its queries."""

    def __init__(self, model: Any, grams: Grams, kv_heads: Mapping[int, int]) -> None:
        def record(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            number = module.layer_idx
            if number in kv_heads:
                q = query.detach().float().transpose(0, 1).reshape(kv_heads[number], -1, query.shape[-1])
                gram = (q.transpose(1, 2) @ q).cpu().numpy()
                grams[number] = grams[number] + gram if number in grams else gram
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

        AttentionInterface.register("forge_calibrate", record)
        AttentionMaskInterface.register("forge_calibrate", sdpa_mask)
        self._running = attention(model, "forge_calibrate")

    def __enter__(self) -> None:
        self._running.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._running.__exit__(*error)


def calibrate(
    model: Any,
    spec: CodecSpec | None = None,
    *,
    bits: float | None = None,
    ids: torch.Tensor | None = None,
    tokens: int = 1024,
    seed: int = 0,
    on_pass: Callable[[], None] | None = None,
) -> Calibration:
    """Measures a model and moves bits between its layers.

    Args:
        model: a transformers causal language model.
        spec: the codec to start from.
        bits: budget in effective bits per element; the spec's own if None.
        ids: tokens to read, int64 [batch, tokens]; random ones if None.
        tokens, seed: how many random ones, and which.
        on_pass: called after each of 2 packed layers + 1 passes.

    Raises:
        ValueError: too few tokens or bits, or a model without layers to pack.
    """
    spec = CodecSpec() if spec is None else spec
    packed = ForgeCache(model, spec).packed
    if not packed:
        raise ValueError("[calibrate] expected a model with full-attention layers; got one without")
    if ids is None:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.from_numpy(np.random.default_rng(seed).integers(0, vocabulary, (1, tokens)))
    least = 2 * (spec.sinks + spec.window + PAGE)
    if ids.shape[1] < least:
        raise ValueError(f"[calibrate] expected at least {least} tokens; got {ids.shape[1]}")
    codecs = codecs_for(model, spec.with_bits(3, 3), packed)
    sensitivities, grams = measure(model, ids.to(model.device), codecs, on_pass)
    dim = codecs[packed[0]].head_dim

    def cost(k_bits: int, v_bits: int) -> float:
        return spec.with_bits(k_bits, v_bits).page_format(dim).effective_bits

    budget = spec.page_format(dim).effective_bits if bits is None else bits
    return Calibration(fingerprint(model), spec, allocate(sensitivities, budget, cost), grams)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`forgeattn calibrate`."""
    if args.sparse:
        from . import measure as attention_of_heads

        return attention_of_heads.run(args)
    from .. import models
    from ..codec.presets import PRESETS
    from ..util.environment import environment
    from ..util.progress import progress
    from .evaluation import texts

    model, tokenizer = models.load(args.model, device=args.device)
    spec, ids = PRESETS[args.preset], None
    if args.text != "random":
        ids = tokenise(tokenizer, texts.enough(args.text, 8 * args.tokens))[None, : args.tokens]
        ids = opened(ids, first_tokens(tokenizer))
    packed = len(ForgeCache(model, spec).packed)
    with progress("Measuring layers", 2 * packed + 1) as advance:
        made = calibrate(model, spec, bits=args.bits, ids=ids, tokens=args.tokens, seed=args.seed, on_pass=advance)
    made.save(args.out)
    codecs = made.codecs(model)
    mean = sum(c.format.effective_bits for c in codecs.values()) / len(codecs)
    size = Path(args.out).stat().st_size
    for side, name in enumerate(("keys", "values")):
        print(f"{name:>6}: " + " ".join(str(made.table[i][side]) for i in sorted(made.table)))
    print(f"{mean:.4f} effective bits per element; {args.out}: {size:,} bytes")
    return {
        "model": args.model,
        "spec": json.loads(spec.to_json()),
        "bits": mean,
        "k_bits": [made.table[i][0] for i in sorted(made.table)],
        "v_bits": [made.table[i][1] for i in sorted(made.table)],
        "env": environment(),
    }
