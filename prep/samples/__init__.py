"""Turns an annotation and its media into a sample.

In: a checked annotation, a tokenizer, and the headers (scan) or pixels (write) of its media. Out: first a
:class:`~prep.samples.sample.Measured` sample with its sizes, later an :class:`~prep.samples.sample.EncodedSample` with
token ids, labels, mRoPE positions and frames.
"""
