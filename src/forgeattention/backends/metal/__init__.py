"""The Metal kernels, kernels/metal: which module launches which op, and whether it can here.

They read MLX arrays alone. Rotations, centres and dtype casts are MLX operations around the kernels. The modules know
only shapes, so the tests run the same code with NumPy arrays and an emulator for a device (`launch.Device`).
"""

from .launch import available_to_mlx

OPS: dict[str, str] = {}
MLX_OPS = {
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


def available() -> tuple[bool, str]:
    return False, "Metal kernels read MLX arrays"


__all__ = ["MLX_OPS", "OPS", "available", "available_to_mlx"]
