"""Calibration: which layers deserve more bits, and what their queries look like, kept in a small file per model.

Each layer's keys and values are coded alone at 3 bits while the model reads a text, and the KL divergence of its
predictions is taken as that layer's and side's sensitivity. Bits then move from where they matter
least to where they matter most, at the same total. The Gram matrices of the queries met on the way shape the errors of
keys.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import ops
from .codec import PAGE, Codec, CodecSpec
from .codec.spec import FORMAT_VERSION, Code
from .codec.weights import weight_codecs
from .evaluation.streaming import attention, spans, step
from .integrations.hf import ForgeCache, fingerprint
from .ops.table import PageTable

FORMAT = "forgeattention calibration"
GRAM_RIDGE = 0.3
"""Share of the identity mixed into Gram matrices of queries, which are those of other texts."""
BLOCK = 128
BITS = (2, 3, 4)
ERROR = {"k": {2: 5.0, 3: 1.0, 4: 0.4}, "v": {2: 3.0, 3: 1.0, 4: 0.28}}
"""Divergence of a layer's side by its bits, over that at 3 bits: about its codes' squared error, 2 bits a bit worse."""

Table = dict[int, tuple[int, int]]
"""K and V bits of each layer."""
Sensitivities = dict[int, tuple[float, float]]
Grams = dict[int, NDArray[np.float32]]


def layer_spec(spec: CodecSpec, k_bits: int, v_bits: int) -> CodecSpec:
    """`spec` at other bits: keys and 2-bit values have a trellis, 4 bits none, 3-bit values what `spec` has."""
    v_code: Code = "scalar" if v_bits == 4 else "trellis8" if v_bits == 2 else spec.v_code
    return replace(spec, k_bits=k_bits, v_bits=v_bits, k_code="auto", v_code=v_code)


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


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a calibration file holds.

    Attributes:
        model: fingerprint of the model.
        spec: the spec whose bits were moved.
        table: K and V bits by layer.
        grams: query Gram matrices by layer, [kv_heads, head_dim, head_dim], of mean diagonal 1.
    """

    model: str
    spec: CodecSpec
    table: Table
    grams: Grams

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file."""
        tensors: dict[str, NDArray[Any]] = {f"gram.{i}": g.astype(np.float16) for i, g in self.grams.items()}
        numbers = sorted(self.table)
        tensors["layers"] = np.array([(i, *self.table[i]) for i in numbers], np.int32).reshape(-1, 3)
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "model": self.model, "spec": self.spec.to_json()}
        save_file(tensors, os.fspath(path), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> Calibration:
        """Reads a file made for this model.

        Raises:
            ValueError: a damaged file, another format version, or another model.
        """
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"[calibration] expected a complete safetensors file; got {path}: {error}") from None
        for name, want in (("format", FORMAT), ("version", str(FORMAT_VERSION)), ("model", fingerprint(model))):
            if metadata.get(name) != want:
                raise ValueError(f"[calibration] expected {name} {want}; got {metadata.get(name)}")
        table = {int(i): (int(k), int(v)) for i, k, v in tensors.pop("layers")}
        grams = {int(name.removeprefix("gram.")): g.astype(np.float32) for name, g in tensors.items()}
        return cls(metadata["model"], CodecSpec.from_json(metadata["spec"]), table, grams)

    def codecs(self, model: Any) -> dict[int, Codec]:
        """Codecs of the calibrated layers."""
        plain = codecs_for(model, self.spec, self.table)
        out = {}
        for number, (k_bits, v_bits) in self.table.items():
            base = plain[number]
            out[number] = Codec(
                layer_spec(self.spec, k_bits, v_bits),
                base.head_dim,
                base.kv_heads,
                k_diagonal=None if base.k_transform.diagonal is None else base.k_transform.diagonal[:, : base.head_dim],
                query_gram=self.grams[number],
                gram_ridge=GRAM_RIDGE,
            )
        return out


def codecs_for(model: Any, spec: CodecSpec, layers: Iterable[int], fitted: bool = True) -> dict[int, Codec]:
    """Codecs of a model's layers, where possible and wanted fitted to its weights."""
    text = model.config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    own = weight_codecs(model, spec, layers) if fitted else {}
    return {i: own.get(i) or Codec(spec, dim, text.num_key_value_heads) for i in layers}


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
    codecs = codecs_for(model, layer_spec(spec, 3, 3), packed)
    sensitivities, grams = measure(model, ids.to(model.device), codecs, on_pass)
    dim = codecs[packed[0]].head_dim

    def cost(k_bits: int, v_bits: int) -> float:
        return layer_spec(spec, k_bits, v_bits).page_format(dim).effective_bits

    budget = spec.page_format(dim).effective_bits if bits is None else bits
    return Calibration(fingerprint(model), spec, allocate(sensitivities, budget, cost), grams)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`forgeattn calibrate`."""
    if args.sparse:
        from .sparse import measure as attention_of_heads

        return attention_of_heads.run(args)
    from . import models
    from .codec.presets import PRESETS
    from .evaluation import report, texts

    model, tokenizer = models.load(args.model, device=args.device)
    spec, ids = PRESETS[args.preset], None
    if args.text != "random":
        ids = tokenizer(texts.read(args.text), add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = ids[:, : args.tokens]
    packed = len(ForgeCache(model, spec).packed)
    with report.progress("Measuring layers", 2 * packed + 1) as advance:
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
        "env": report.environment(),
    }
