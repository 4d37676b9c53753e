"""What the process that ranks are forked from does once, after all imports.

It works out transformers' table of renamed weights: hundreds of regular expressions, which every run would compile
again when it loads the model. And it takes what was imported from the garbage collector, which every rank would let
look at a million objects.
"""

from __future__ import annotations

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen2_5_vl")
gc.collect()
gc.freeze()
