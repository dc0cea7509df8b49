"""What a calibration of one model found, and its file: bits of each layer and Gram matrices of its queries."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codec import Codec, CodecSpec
from ..codec.spec import FORMAT_VERSION
from ..util.tensor_files import load_tensors, save_tensors
from .fingerprint import fingerprint
from .weights.hf import weight_codecs

OP = "calibration"
KIND = {"format": "forgeattention calibration", "version": str(FORMAT_VERSION)}
GRAM_RIDGE = 0.3
"""Share of the identity mixed into Gram matrices of queries, which are those of other texts."""
Table = dict[int, tuple[int, int]]
"""K and V bits of each layer."""
Grams = dict[int, NDArray[np.float32]]


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
        """Writes a safetensors file, whole or not at all."""
        tensors: dict[str, NDArray[Any]] = {f"gram.{i}": g.astype(np.float16) for i, g in self.grams.items()}
        numbers = sorted(self.table)
        tensors["layers"] = np.array([(i, *self.table[i]) for i in numbers], np.int32).reshape(-1, 3)
        save_tensors(path, tensors, {**KIND, "model": self.model, "spec": self.spec.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> Calibration:
        """Reads a file made for this model.

        Raises:
            ValueError: a damaged file, another format version, or another model.
        """
        metadata, tensors = load_tensors(path, OP, KIND | {"model": fingerprint(model)})
        rows = tensors.pop("layers", None)
        if rows is None or rows.ndim != 2 or rows.shape[1] != 3 or "spec" not in metadata:
            raise ValueError(f"[{OP}] expected a spec and bits by layer; got {path} without")
        table = {i: (k, v) for i, k, v in rows.tolist()}
        if sorted(tensors) != sorted(f"gram.{i}" for i in table):
            raise ValueError(f"[{OP}] expected a Gram matrix for each layer {sorted(table)}; got {sorted(tensors)}")
        grams = {int(name.removeprefix("gram.")): g.astype(np.float32) for name, g in tensors.items()}
        return cls(metadata["model"], CodecSpec.from_json(metadata["spec"]), table, grams)

    def codecs(self, model: Any) -> dict[int, Codec]:
        """Codecs of the calibrated layers."""
        plain = codecs_for(model, self.spec, self.table)
        out = {}
        for number, (k_bits, v_bits) in self.table.items():
            base = plain[number]
            out[number] = Codec(
                self.spec.with_bits(k_bits, v_bits),
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
