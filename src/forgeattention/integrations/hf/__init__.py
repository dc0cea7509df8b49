"""Hugging Face transformers: `ForgeCache` and the attention implementation "forge", which importing this registers."""

import torch

MIN_TORCH = (2, 9)

# pip is not told of this bound, because it would replace a torch that is already there.
if torch.__version__ < MIN_TORCH:  # type: ignore[operator]
    raise ImportError(
        f"[forgeattention] expected torch {'.'.join(map(str, MIN_TORCH))} or newer; got {torch.__version__}: "
        "upgrade torch by the way it was installed, for example pip install --upgrade torch",
        name="torch",
    )

from .attention import register  # noqa: E402
from .cache import ForgeCache  # noqa: E402
from .graph import DecodeGraph  # noqa: E402

__all__ = ["DecodeGraph", "ForgeCache", "register"]
