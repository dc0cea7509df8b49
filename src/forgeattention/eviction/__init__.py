"""Which tokens are kept: scores, policies, demotion."""

from ..models.rope import Rope, rope_of
from .evictor import Evictor
from .policy import POLICIES, V1, V2, V3, AttentionWindow, Policy, Random, Recency, attention_fraction
from .settings import Eviction
from .triattention import Centres, load_centres, save_centres

__all__ = [
    "POLICIES",
    "V1",
    "V2",
    "V3",
    "AttentionWindow",
    "Centres",
    "Eviction",
    "Evictor",
    "Policy",
    "Random",
    "Recency",
    "Rope",
    "attention_fraction",
    "load_centres",
    "rope_of",
    "save_centres",
]
