"""The native CPU kernels, kernels/cpu: which module launches which op, and whether it can here."""

from .native import available

OPS = {
    "encode": "cpu.pages",
    "append_tokens": "cpu.pages",
    "append_step": "steps",
    "encode_rows": "cpu.steps",
    "decode_pages": "cpu.pages",
    "decode_into": "cpu.pages",
    "compact": "cpu.pages",
    "decode_attention": "cpu.attention",
    "prefill_attention": "cpu.attention",
    "merge": "cpu.attention",
    "qk_scores": "cpu.scores",
    "value_sum": "cpu.scores",
    "sparse_scores": "cpu.sparse",
    "sparse_threshold": "cpu.sparse",
    "sparse_attention": "cpu.sparse",
    "page_scores": "cpu.sparse",
    "page_select": "cpu.sparse",
}
# MLX's arrays do not stay in place, so nothing can be appended to them.
MLX_OPS = {
    "encode": "cpu.mlx",
    "decode_pages": "cpu.mlx",
    "compact": "cpu.mlx",
    "decode_attention": "cpu.mlx",
    "prefill_attention": "cpu.mlx",
    "merge": "mlx.merge",
    "qk_scores": "cpu.mlx",
    "value_sum": "cpu.mlx",
    "sparse_scores": "cpu.mlx",
    "sparse_threshold": "cpu.mlx",
    "sparse_attention": "cpu.mlx",
    "page_scores": "cpu.mlx",
    "page_select": "mlx.pages",
}
available_to_mlx = available

__all__ = ["MLX_OPS", "OPS", "available", "available_to_mlx"]
