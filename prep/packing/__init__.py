"""Packs samples into bins.

In: the sizes of every sample. Out: the bin of every sample, from :func:`pack`. :mod:`~prep.packing.best_fit` packs a
token budget, :mod:`~prep.packing.bin_slack` fills bins better if lengths are narrow, and
:mod:`~prep.packing.two_budgets` packs tokens and vision patches together. Pure functions of NumPy arrays.
"""

from prep.packing.best_fit import pack

__all__ = ["pack"]
