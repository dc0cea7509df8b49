"""A KV cache in about 3 bits per element that attention reads without unpacking it."""

from .codec.spec import CodecSpec

__all__ = ["CodecSpec", "__version__"]
__version__ = "0.1.0"
