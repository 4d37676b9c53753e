"""``vlprep report``: one self-contained HTML page about a set of shards.

In: a finished set; if they are available, the tokenizer and the datasets that made it. Out: the page, with equal bytes
for equal inputs. ``statistics`` counts, ``choice`` picks the samples to show, ``sources`` looks up what the shards no
longer have, ``command`` writes the command that builds it, ``charts`` and ``gallery`` prepare drawings and
samples, ``page`` puts all into ``templates``, and ``writer`` writes the file. Cost: a pass over the tables, and the
decoding of a few bins.
"""

from prep.inspect.report.command import NamedInputs
from prep.inspect.report.writer import ReportRequest, render_report, write_report

__all__ = ["NamedInputs", "ReportRequest", "render_report", "write_report"]
