"""Read-only views of annotations and of finished shards, for people.

In: annotation files, or a set of shards. Out: a report of problems (``validate``), every broken rule of a set
(``verify``), a bin or a training step as text and images (``show``), or an HTML page about a set (``report``).
``transcript`` turns token ids back into text. Nothing here changes a set of shards.
"""
