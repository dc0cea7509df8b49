"""The CUDA kernels, kernels/cuda: which module launches which op, and whether it can here.

The modules of `OPS` need PyTorch, that of `MLX_OPS` needs MLX.
"""

from .nvrtc import available, available_to_mlx

OPS = {
    "encode": "pages",
    "append_tokens": "pages",
    "decode_pages": "pages",
    "compact": "pages",
    "decode_attention": "attention",
    "prefill_attention": "prefill",
    "merge": "attention",
    "qk_scores": "scores",
    "value_sum": "scores",
    "sparse_scores": "sparse",
    "sparse_threshold": "sparse",
    "sparse_attention": "sparse",
    "page_scores": "sparse",
    "page_select": "sparse",
}
MLX_OPS = dict.fromkeys(
    ("encode", "decode_pages", "decode_attention", "prefill_attention", "qk_scores", "value_sum"), "mlx"
)

__all__ = ["MLX_OPS", "OPS", "available", "available_to_mlx"]
