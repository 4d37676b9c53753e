"""Qwen2.5-VL over packed samples.

In: a checkpoint in the Hugging Face layout, and one :class:`~train.batches.batch.MicroBatch` per forward pass.
Out: the summed cross-entropy of its targets, parameter groups for the optimizer, and a trained checkpoint or adapter.
``packed`` is the forward pass. ``attention`` and ``pixels`` serve it; ``kernels``, ``adapters`` and ``optim`` prepare
the model; ``pretrained`` loads and writes it; ``sizes`` and ``flops`` describe it in numbers.
"""
