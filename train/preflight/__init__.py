"""The dry run: would a run succeed?

In: the flags of a run, on the ranks of the run. Out: a log of what it needs, and one error with everything that is
wrong. :mod:`.dry_run` has the steps, :mod:`.capacity` compares the estimate with what device, host and disk have,
:mod:`.passes` tries the largest bins, :mod:`.parity` compares packed samples with the same samples alone,
:mod:`.problems` collects what is wrong on all ranks.
"""
