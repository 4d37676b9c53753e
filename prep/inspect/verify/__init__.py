"""``vlprep verify``: every byte, count and invariant of a finished set of shards.

In: a folder or URL of a set. Out: a :class:`Verification` with every :class:`Finding`, not only the first. The manifest
and the tables are compared with each other (``tables``, ``statistics``, ``drift``), then each shard (``shard``) and
each bin (``bins``, ``positions``) is checked against them. Positions, statistics and counts are recomputed here by
independent code. Of the code that wrote them, only the wording of the drift is imported.
"""

from prep.inspect.verify.findings import Finding
from prep.inspect.verify.shard_set import Verification, verify

__all__ = ["Finding", "Verification", "verify"]
