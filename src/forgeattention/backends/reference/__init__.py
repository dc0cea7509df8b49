"""The float64 NumPy oracle as a backend, for arrays of every framework: slow, and chosen only by name."""

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
MLX_OPS = OPS


def available() -> tuple[bool, str]:
    return True, "NumPy in float64"


available_to_mlx = available
