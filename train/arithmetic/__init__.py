"""What a model and its bins cost, worked out from ``config.json`` without torch.

In: the contents of ``config.json``, and counts per bin from the index. Out: the dimensions of the model
(:mod:`.dimensions`), the table of its weights (:mod:`.weights`), and the FLOPs of every bin (:mod:`.cost`).
"""
