"""Builds a set of shards: index, scan, plan, write, seal.

In: a :class:`~prep.build.pipeline.BuildRequest` (datasets, settings, output) and an engine that runs the parallel
steps. Out: shards, ``bins.parquet``, ``samples.parquet`` and, last, ``manifest.json``. :mod:`~prep.build.parts` is the
format between scan and the steps after it. The work folder (:mod:`~prep.build.work`) makes every step resumable.
"""
