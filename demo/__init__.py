"""The demo: a generated dataset and a tiny checkpoint, to run the whole pipeline without downloading anything.

In: a seed. Out: ``write_demo`` writes annotations with images and videos, a held-out part and a few broken records;
``tiny_model`` writes a Qwen2.5-VL checkpoint with small random weights and the real tokenizer.
No product code imports this package, and it is not part of the wheel: it needs a checkout.
"""

from demo.dataset import DemoSummary, write_demo

__all__ = ["DemoSummary", "write_demo"]
