"""The Metal kernels, kernels/metal: which module launches which op, and whether it can here.

They read MLX arrays alone. Rotations, centres and dtype casts are MLX operations around the kernels. The modules know
only shapes, so the tests run the same code with NumPy arrays and an emulator for a device (`launch.Device`).
"""

from .launch import available_to_mlx

OPS: dict[str, str] = {}
MLX_OPS = {
    "encode": "metal.pages",
    "decode_pages": "metal.pages",
    "compact": "metal.pages",
    "decode_attention": "metal.attention",
    "prefill_attention": "metal.attention",
    "merge": "mlx.merge",
    "qk_scores": "metal.scores",
    "value_sum": "metal.scores",
    "sparse_scores": "metal.sparse",
    "sparse_threshold": "metal.sparse",
    "sparse_attention": "metal.sparse",
    "page_scores": "metal.sparse",
    "page_select": "mlx.pages",
}


def available() -> tuple[bool, str]:
    return False, "Metal kernels read MLX arrays"


__all__ = ["MLX_OPS", "OPS", "available", "available_to_mlx"]
