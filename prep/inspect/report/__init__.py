"""``vlprep report``: one self-contained HTML page about a set of shards.

In: a finished set, and the tokenizer that made it if it is available. Out: the page, with equal bytes for equal sets.
``statistics`` reads the numbers from the tables, ``charts`` and ``samples`` draw them and a few bins as HTML, ``page``
lays everything out, and ``writer`` writes the file. Cost: one pass over the tables, and decoding a few bins.
"""

from prep.inspect.report.writer import render_report, write_report

__all__ = ["render_report", "write_report"]
