"""What the process that ranks are forked from works out once: transformers' table of renamed weights.

It is hundreds of regular expressions, which every run would compile again when it loads the model.
"""

from __future__ import annotations

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen2_5_vl")
