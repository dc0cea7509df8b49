"""The native CPU kernels, kernels/cpu: which module launches which op, and whether it can here."""

from .native import available

OPS = {
    "encode": "pages",
    "decode_pages": "pages",
    "compact": "pages",
    "decode_attention": "attention",
    "prefill_attention": "attention",
    "qk_scores": "scores",
    "value_sum": "scores",
    "sparse_scores": "sparse",
    "sparse_threshold": "sparse",
    "sparse_attention": "sparse",
    "page_scores": "sparse",
}
MLX_OPS = dict.fromkeys(OPS, "mlx")
available_to_mlx = available

__all__ = ["MLX_OPS", "OPS", "available", "available_to_mlx"]
