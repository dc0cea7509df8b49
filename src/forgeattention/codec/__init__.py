"""Codec: what a cached key or value becomes in about three bits."""

from .codebook import Codebook, codebook
from .codec import Codec
from .spec import PAGE, CodecSpec, PageFormat

__all__ = ["PAGE", "Codebook", "Codec", "CodecSpec", "PageFormat", "codebook"]
