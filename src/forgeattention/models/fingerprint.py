"""Hex digests that tell models apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..ops.arrays import dtype_of


def fingerprint(model: Any) -> str:
    """Of a transformers model: the config, and a sample of every parameter."""
    config = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "use_cache"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, p in model.named_parameters():
        flat = p.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].double().cpu().numpy()
        digest.update(f"{name} {list(p.shape)} {dtype_of(p)}".encode() + sample.tobytes())
    return digest.hexdigest()[:32]


def mlx_fingerprint(model: Any) -> str:
    """Of an mlx-lm model: the arguments, and a sample of every parameter."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    digest = hashlib.sha256(json.dumps(vars(model.args), sort_keys=True, default=str).encode())
    for name, p in tree_flatten(model.parameters()):
        flat = p.reshape(-1)
        sample = np.array(flat[:: max(1, flat.size // 64)].astype(mx.float32))
        digest.update(f"{name} {p.shape} {p.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()[:32]
