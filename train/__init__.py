"""The trainer: streams packed bins into Qwen2.5-VL under DeepSpeed; decodes no media and tokenizes nothing.

Data side, from the folder of shards to what a forward pass needs::

    open_shards (index) -> DataOrder (order) -> BinStream (stream) -> MicroBatch (batch) -> pixel_values (pixels)

==========  ==========================================================================================
``index``   what a set of shards holds: one NumPy column for each number known about a bin
``cost``    floating-point operations of a bin, from the index alone
``order``   which bins a step takes and which rank gets which: a pure function
``explain`` ``python -m train.order``: prints a step with the source line of every sample
``vision``  precomputed inputs of the vision tower
``batch``   what one forward pass needs, built on the CPU
``pixels``  stored planes -> ``pixel_values``, on the device
``reader``  one bin, read and checked
``stream``  background threads that keep batches ready
==========  ==========================================================================================
"""
