"""From encoded samples to a shard on disk.

In: the samples of a bin. Out: a tar file with one run of members per bin, and its rows of ``bins.parquet``. Pixels are
encoded here (:mod:`~prep.shards.codecs`), and the drift of a lossy codec is measured. :mod:`storage` reads shards.
"""
