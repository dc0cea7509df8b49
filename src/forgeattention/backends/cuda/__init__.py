"""The CUDA kernels, kernels/cuda: which module launches which op, and whether it can here.

The modules of `OPS` and `PAGED_STEPS` need PyTorch, that of `MLX_OPS` needs MLX.
"""

from .nvrtc import available, available_to_mlx

OPS = {
    "encode": "cuda.pages",
    "append_tokens": "cuda.pages",
    "append_step": "cuda.steps",
    "encode_rows": "cuda.pages",
    "decode_pages": "cuda.pages",
    "decode_into": "cuda.pages",
    "compact": "cuda.pages",
    "decode_attention": "cuda.attention",
    "prefill_attention": "cuda.prefill",
    "merge": "cuda.attention",
    "qk_scores": "cuda.scores",
    "value_sum": "cuda.scores",
    "sparse_scores": "cuda.sparse",
    "sparse_threshold": "cuda.sparse",
    "sparse_attention": "cuda.sparse",
    "page_scores": "cuda.sparse",
    "page_select": "cuda.sparse",
}
MLX_OPS = {
    "encode": "cuda.mlx",
    "decode_pages": "cuda.mlx",
    "compact": "cuda.mlx",
    "decode_attention": "cuda.mlx",
    "prefill_attention": "cuda.mlx",
    "merge": "mlx.merge",
    "qk_scores": "cuda.mlx",
    "value_sum": "cuda.mlx",
}
PAGED_STEPS = "cuda.paged"

__all__ = ["MLX_OPS", "OPS", "PAGED_STEPS", "available", "available_to_mlx"]
