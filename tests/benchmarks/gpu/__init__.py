"""The benchmark that compares a training step on a GPU with that of the upstream trainer. See ``__main__``.

In: a scale (:mod:`.scale`), which says how much of everything. Out: tables, as they become complete. :mod:`.corpus`
makes the samples and shards; :mod:`.online` processes the same samples as the upstream trainer does; :mod:`.models`
builds a random model that every contender uses in turn; :mod:`.contenders` says who they are; :mod:`.measure` times
them; :mod:`.kernels` times single kernels; :mod:`.tables` formats the figures; :mod:`.parts` does all of it in a
process that :mod:`.supervisor` keeps within its time.
"""
