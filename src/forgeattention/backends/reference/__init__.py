"""The float64 NumPy oracle as a backend, for arrays of every framework: slow, and chosen only by name."""

OPS = {
    "encode": "reference.pages",
    "append_tokens": "reference.pages",
    "append_step": "steps",
    "encode_rows": "reference.steps",
    "decode_pages": "reference.pages",
    "decode_into": "reference.pages",
    "compact": "reference.pages",
    "decode_attention": "reference.attention",
    "prefill_attention": "reference.attention",
    "merge": "reference.attention",
    "qk_scores": "reference.scores",
    "value_sum": "reference.scores",
    "sparse_scores": "reference.sparse",
    "sparse_threshold": "reference.sparse",
    "sparse_attention": "reference.sparse",
    "page_scores": "reference.sparse",
    "page_select": "reference.sparse",
}
# MLX's arrays do not stay in place.
IN_PLACE = ("append_tokens", "append_step", "decode_into", "encode_rows")
MLX_OPS = {op: module for op, module in OPS.items() if op not in IN_PLACE}


def available() -> tuple[bool, str]:
    return True, "NumPy in float64"


available_to_mlx = available
