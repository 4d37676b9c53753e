"""Bins of a step, made ready for the forward pass while the previous steps train.

In: an index of shards and the order of its bins.
Out: an iterator of :class:`~train.batches.stream.StepBatch`, one per optimizer step, with the rank's micro-batches.
``stream`` plans ahead, ``workers`` are its threads, ``batch`` concatenates bins, and ``vision_inputs`` computes what
the vision tower needs besides pixels.
"""
