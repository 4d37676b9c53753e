"""From a set of shards to checked bins.

In: the value of ``--shards``. Out: a :class:`~train.shards.index.ShardIndex` with one column per property of a bin, and
a :class:`~train.shards.reader.BinReader` that reads a bin from its shard, or from the local cache, into a buffer.
Opening, tables and parsing are those of :mod:`storage`.
"""
