"""A dataset made from a seed, to see the whole pipeline at work without downloading anything.

``write_demo`` writes annotations with real pictures and clips: scenes of coloured shapes, charts, pages of documents,
moving shapes, and chats, in English and Chinese; a held-out part with other media and the same kinds of questions; and
a few broken records for the ledger. Every answer can be checked by looking, none by reading the question alone.

How it is made, step by step:

1. ``scenes``, ``charts``, ``pages``, ``clips``: facts drawn at random, and facts turned into pixels.
2. ``scene_questions``, ``chart_questions``, ``page_questions``, ``clip_questions``, ``chats``: facts -> questions with
   their answers, worded by ``vocabulary``.
3. ``kinds``: facts are sampled until the answers of every kind of question are balanced; ``dataset``: the plan.
4. ``media`` (pictures -> bytes), ``records`` (drafts -> records), ``broken`` (the broken lines), ``writer`` (files).
"""

from demo.writer import DemoSummary, write_demo

__all__ = ["DemoSummary", "write_demo"]
