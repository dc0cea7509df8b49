"""`forgeattn compile`: CUDA kernels compiled before they are needed, also on a machine without a GPU."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from ..backends.cuda import nvrtc, paged, plans
from ..codec.codec import Codec
from ..codec.spec import PAGE, CodecSpec
from ..models.shape import inspect, read_config
from ..ops.page_tables import exact_block_tokens

BYTES = {"float16": 2, "bfloat16": 2}
Needed = list[tuple[str, nvrtc.Macros, int]]


def run_vllm(args: argparse.Namespace) -> dict[str, Any]:
    """Compile, into the cache folder, what vLLM's steps need for a model. Returns the kernels and the seconds."""
    from ..util.environment import environment
    from .evaluation.setup import spec_from

    arch = args.arch or _this_gpu()
    if arch not in plans.LIMITS_OF:
        raise ValueError(f"[compile] expected --arch among {', '.join(plans.LIMITS_OF)}; got {arch}")
    needed = vllm_kernels(
        read_config(args.model),
        spec_from(args),
        plans.LIMITS_OF[arch],
        dtype=args.dtype,
        block=args.block_size,
        ranks=args.tensor_parallel_size,
        drafts=args.drafts,
        fit=not args.no_fit,
    )
    begun = time.perf_counter()
    for (stem, _, _), code in zip(needed, nvrtc.start([each[:2] for each in needed], arch), strict=True):
        print(f"{stem}: {len(code.result()):,} bytes after {time.perf_counter() - begun:.1f} s", flush=True)
    seconds = time.perf_counter() - begun
    print(f"{len(needed)} kernels for {arch} in {nvrtc.cache_folder('cuda')}")
    kernels = [{"kernel": stem, "macros": dict(macros)} for stem, macros, _ in needed]
    return {"model": args.model, "arch": arch, "seconds": seconds, "kernels": kernels, "env": environment()}


def vllm_kernels(
    config: Any,
    spec: CodecSpec,
    limits: plans.Limits,
    *,
    dtype: str = "bfloat16",
    block: int = PAGE,
    ranks: int = 1,
    drafts: int = 0,
    fit: bool = True,
) -> Needed:
    """Stem, macros and shared memory of every kernel that vLLM's steps launch for a model's full-attention layers.

    Args:
        config: a transformers config.
        spec: how keys and values are coded.
        limits: of the device.
        dtype: of the model.
        block: vLLM's block size, a multiple of 64.
        ranks: over which the heads are dealt out.
        drafts: speculative tokens of a step.
        fit: whether codecs are fitted to the model's weights.

    Raises:
        ValueError: a block size that holds no whole pages, or a model without a layer that is packed.
    """
    if block < PAGE or block % PAGE:
        raise ValueError(f"[compile] expected --block-size a multiple of {PAGE}; got {block}")
    text = config.get_text_config(decoder=True)
    shapes = {(layer.kv_heads, layer.k_dim) for layer in inspect(config).layers if layer.packable}
    if not shapes:
        raise ValueError(f"[compile] expected layers of full attention; got none in {text.model_type}")
    needed: dict[tuple[str, nvrtc.Macros, int], None] = {}
    for all_heads, dim in sorted(shapes):
        kv_heads, q_heads = max(1, all_heads // ranks), text.num_attention_heads // ranks
        # Any Gram matrix: kernels differ by whether there is one.
        codec = Codec(spec, dim, kv_heads, query_gram=np.eye(dim)[None] if fit else None)
        exact = exact_block_tokens(block // PAGE * codec.page_bytes, 2 * kv_heads * dim * BYTES[dtype])
        needed |= dict.fromkeys(paged.kernels(codec, q_heads, {1, 1 + drafts}, dtype, exact, limits))
    return list(needed)


def _this_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f"[compile] expected --arch on a machine without a GPU ({', '.join(plans.LIMITS_OF)}); got none"
        )
    return nvrtc.architecture_of()
