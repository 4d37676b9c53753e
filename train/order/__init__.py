"""Which bins a step takes, and which rank gets which.

In: the cost of every bin, a seed, the global batch, and optionally the proportions of a mixture.
Out: the bins of any step in O(1), so that a run resumes exactly, on any number of ranks.
``dealing`` is the order, ``permutation`` its randomness, and ``run_order`` applies it to the settings of a run.
``explain`` and ``simulate`` describe a step and a whole run for ``python -m train.order``.
"""
