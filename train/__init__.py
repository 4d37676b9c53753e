"""The trainer: packed bins in, a fine-tuned Qwen2.5-VL out. It decodes no video and tokenizes nothing.

The path of a bin, from file to gradient, reads top to bottom, and so do the packages::

    shards     indexes the bins of all sets; reads and checks them              ShardIndex, BinReader
    order      decides which bins a step takes and which rank gets which        DataOrder
    batches    builds the batches of the coming steps in background threads     BinStream, MicroBatch
    model      runs the forward pass on packed samples; groups parameters       PackedQwen
    run        trains: the loop, checkpoints, evaluation, metrics               train()

``settings`` declares the options of a run, ``arithmetic`` counts the operations of a bin, and ``main`` is the entry
point. Other commands: ``preflight`` (the dry run), ``memory`` (what a run needs, before it starts), ``tools`` (merge an
adapter, summarise a run) and ``generate`` (judge a model by its answers). ``python -m train.order`` explains any step
of a run.

Imports point upwards in this list only; import-linter checks it.
"""
