"""A training run, from its flags to the trained model.

In: flags, shards, a checkpoint of transformers, the launcher's environment. Out: ``<run>/final``, checkpoints to resume
from, metrics. ``plan`` checks everything first, and ``strategy`` chooses how ranks share the work. ``loop`` trains,
``engine`` wraps DeepSpeed, ``saving`` writes checkpoints, ``checkpoint`` and ``run_dir`` resume from them, ``metrics``
and ``evaluation`` report.
"""
