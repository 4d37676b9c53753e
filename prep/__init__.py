"""``vlprep``: chat annotations with images and videos in, packed training shards out.

::

    annotation files                     datasets.toml
          |  records                          |  registry
          v                                   v
        index ----- chunks of records -----> draw
          |
          v
        scan    validate, probe headers, tokenize, measure          (parallel over chunks; no pixel is decoded)
          |
          v
        plan    lengths -> bins -> shards                           (one process, a pure function)
          |
          v
        write   decode, resize, encode, assemble                    (parallel over shards)
          |
          v
        seal    ledger, tables, manifest                            (one process; the manifest comes last)

Works without torch.
"""
