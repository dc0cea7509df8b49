"""Measures of a cache against the exact one: needles, KL divergence, bytes."""
