"""Memory of a run, worked out before it runs.

In: parameter counts, the DeepSpeed configuration, and the largest micro-batch. Out: memory of a rank, term by term
(:mod:`.budget`, printed by ``python -m train.memory``), and the number of bins for which a device has room.
Weights and optimizer states are in :mod:`.states`, activations in :mod:`.activations`, largest bins in :mod:`.loads`.
"""
