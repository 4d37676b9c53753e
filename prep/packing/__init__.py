"""Samples into bins: the sizes of every sample in, the bin of every sample out.

:func:`pack` is the way in. :mod:`~prep.packing.best_fit` packs one budget of tokens, :mod:`~prep.packing.bin_slack`
what best fit leaves open with narrow lengths, :mod:`~prep.packing.two_budgets` tokens and vision patches together.
Pure functions of NumPy arrays; nothing here knows samples or files.
"""

from prep.packing.best_fit import pack

__all__ = ["pack"]
