"""Commands for finished runs; nothing in the trainer imports them.

``python -m train.tools.merge`` adds a LoRA adapter to its base model: adapter folder in, checkpoint out.
``python -m train.tools.summary`` describes a finished run in four lines: shards and run folder in, text out.
"""
