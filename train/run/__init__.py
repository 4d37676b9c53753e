"""A training run, from its flags to the trained model.

In: flags, shards, a checkpoint of transformers, the launcher's environment. Out: ``<run>/final``, checkpoints to resume
from, metrics. ``plan`` checks everything first, ``loop`` trains, ``engine`` wraps DeepSpeed, ``checkpoint`` and
``run_dir`` save and resume, ``metrics`` and ``evaluation`` report.
"""
