"""Which packed tokens a decode step reads."""

from .budgets import Budgets
from .spec import SparseSpec
from .step import SparseLayer, SparseStep, sparse_means

__all__ = ["Budgets", "SparseLayer", "SparseSpec", "SparseStep", "sparse_means"]
