"""Memory of a run, worked out before it runs.

In: parameter counts, the DeepSpeed configuration, and the largest micro-batch. Out: memory of a rank, term by term
(:mod:`.budget`, printed by ``python -m train.memory``), and whether device, host and disk have room (:mod:`.capacity`).
Weights and optimizer states are in :mod:`.states`, activations in :mod:`.activations`, largest bins in :mod:`.loads`.
"""
