"""The trainer: streams packed bins into Qwen2.5-VL under DeepSpeed; decodes no media and tokenizes nothing.

The way of the data, from the folder of shards to an optimizer step::

    open_shards -> DataOrder -> BinStream -> MicroBatch -> PackedQwen -> DeepSpeed engine
      (index)       (order)      (stream)     (batch)       (model)       (loop, engine)

===============  =====================================================================================
``main``         entry point
``arguments``    settings of a run; ``flags`` reads them, ``recipe`` fills in what is recommended for a size of model
``plan``         settings, shards and checkpoints that were found to agree
``loop``         a plan -> a trained model: the loop, readable top to bottom
``engine``       DeepSpeed: ranks, device, configuration, start and end
``model``        the packed forward pass around the Hugging Face model; ``attention`` SDPA sample by sample
``optim``        parameter groups, freezing; ``schedule`` the learning rates
``adapters``     LoRA: layers chosen, adapters put in, written and merged; ``merge`` does the last by itself
``kernels``      Liger kernels and compiled layers
``pretrained``   checkpoints of transformers: found, compared with the shards, loaded, written
``checkpoint``   checkpoints to resume from, also with another number of ranks
``interrupt``    a run that is told to stop; ``nonfinite`` steps that are skipped
``evaluation``   loss and accuracy on other shards; ``ledger`` tells of which datasets their samples are
``metrics``      what a logged step tells; ``flops`` counts operations for it; ``summary`` prints a run
``preflight``    a dry run: whether all fits, and packed samples have the losses of the same alone
``capacity``     what there is of device, host and disk, and what a run takes; ``parity`` samples packed and alone
``memory``       of a rank, term by term; ``sizes`` of a model, ``activations`` of a micro-batch, ``budget`` of a run
``index``        what a set of shards holds: one NumPy column for each number known about a bin
``storage``      shards in a folder or behind a URL; ``cache`` keeps copies, ``buffers`` memory to read into
``cost``         floating-point operations of a bin, from the index alone
``mixture``      proportions of several sets of shards
``order``        which bins a step takes and which rank gets which: a pure function
``order_cli``    ``python -m train.order``: ``explain`` prints a step, ``simulate`` a whole run
``vision``       precomputed inputs of the vision tower
``batch``        what one forward pass needs, built on the CPU; ``jpeg`` decodes pixels stored so
``pixels``       stored planes -> ``pixel_values``, on the device
``reader``       one bin, read and checked
``stream``       background threads that keep batches ready
``tiny_model``   a tiny random checkpoint; ``qwen_tokenizer`` builds the real tokenizer for it, offline
===============  =====================================================================================
"""
