"""The contract between the two programs: ``prep -> schemas <- train``.

Everything that ``vlprep`` writes and the trainer (or any other program) reads is defined here, and nowhere else:

==================  ====================================================================================
``annotation``      what a user's record looks like, and the closed list of reasons to reject one
``records``         records of all dialects, for the JSON Schema of editors
``bounds``          what numbers and texts of manifests and tables may be, as sets also come from strangers
``setting``         how a setting is declared: help, unit, bounds and choices beside the field
``foreign_flags``   flags of other trainers that are not flags here, and why
``settings``        the settings of a build, echoed in the manifest
``bins``            members of a bin inside a shard, and their arrays
``codecs``          names of the codecs of pixel planes
``pixels``          the reversible residual coding of pixel planes; ``jpeg`` the member of that codec
``tables``          columns of ``bins.parquet`` and ``samples.parquet`` (the ledger)
``manifest``        ``manifest.json``, which seals a set of shards
``qwen``            control tokens, patch geometry and normalisation of Qwen2.5-VL
``checkpoints``     JSON files of a checkpoint: ``config.json`` and the image processor
``seeds``           a seed for each purpose
``memory``          what both programs say when the system gives no memory
``errors``          the one family of exceptions
``wording``         counts in messages for people
``json_schema``     generates the JSON Schema files in ``schemas/json``
==================  ====================================================================================

Vocabulary: an *annotation* (one input record) becomes a *sample* (token ids, labels, media). Samples are packed
into *bins* (one training sequence each), and bins are stored in *shards* (tar files). A *manifest* seals a set of
shards. The *ledger* accounts for every annotation.

Needs numpy and msgspec only.
"""
