"""The style sheet of a report, for light and dark screens and for paper. It loads nothing."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f4; --card: #ffffff; --line: #dfdfd8; --ink: #1d1f24; --soft: #5d616b;
  --text-only: #5a78c7; --images: #23937f; --video: #cf7a2b; --plain: #5a78c7;
  --packed: #23937f; --rejected: #c3483a; --not-sampled: #a3a6ad;
  --mark: #d5efd9; --mark-edge: #23937f; --control: #8a6d1f; --code: #f0f0eb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f25; --line: #31353e; --ink: #e7e7e3; --soft: #a0a4ae;
    --text-only: #86a1ea; --images: #4cbfa8; --video: #eca35c; --plain: #86a1ea;
    --packed: #4cbfa8; --rejected: #ea7d6f; --not-sampled: #6d717b;
    --mark: #1e4034; --mark-edge: #4cbfa8; --control: #cdb068; --code: #262a31;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 12px; }
h3 { font-size: 15px; margin: 0 0 6px; }
p { margin: 0 0 10px; max-width: 75ch; }
.soft, figcaption { color: var(--soft); }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; margin: 0 0 14px;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 22px 0 0; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tiles b { display: block; font-size: 23px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 13px; }
.balance { font-size: 18px; font-variant-numeric: tabular-nums; margin: 0 0 12px; }
.stack { display: flex; height: 16px; border-radius: 8px; overflow: hidden; background: var(--line); gap: 2px; }
.stack span { min-width: 3px; }
.bg-packed { background: var(--packed); } .bg-rejected { background: var(--rejected); }
.bg-not-sampled { background: var(--not-sampled); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: 13px; margin: 8px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; white-space: nowrap; }
tr:last-child > td { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 10ch; }
td.name:last-child { min-width: 28ch; }
td .nowrap { white-space: nowrap; overflow-wrap: normal; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
code { background: var(--code); border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; }
ul.examples { margin: 0; padding: 0; list-style: none; }
ul.examples li { margin: 0 0 6px; overflow-wrap: anywhere; }
.meter { display: inline-block; width: 90px; height: 8px; border-radius: 4px; background: var(--line); }
.meter i { display: block; height: 8px; border-radius: 4px; background: var(--plain); }
.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; margin: 0 0 14px;
}
.charts .card { margin: 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
figcaption { font-size: 13px; margin-top: 4px; }
svg { display: block; width: 100%; height: auto; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .tick { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg .unit { fill: var(--soft); font-size: 12.5px; }
.c-text-only { fill: var(--text-only); background: var(--text-only); }
.c-images { fill: var(--images); background: var(--images); }
.c-video { fill: var(--video); background: var(--video); }
.c-plain { fill: var(--plain); background: var(--plain); }
.sample { border-top: 1px solid var(--line); padding: 14px 0; }
.media { display: flex; flex-wrap: wrap; gap: 10px; margin: 8px 0; }
.media figure { padding: 0; border: 0; background: none; }
.media img { display: block; max-width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--line); }
.transcript {
  margin: 8px 0 0; padding: 10px 12px; background: var(--code); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 420px; overflow-y: auto; font-size: 13px; line-height: 1.5; tab-size: 4;
}
.transcript span, .transcript mark { unicode-bidi: isolate; }
.transcript .control { color: var(--control); }
mark { background: var(--mark); color: inherit; box-shadow: 0 2px 0 var(--mark-edge); }
details { margin: 0 0 14px; } summary { cursor: pointer; font-weight: 600; margin: 0 0 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
@media print { body { background: none; } .transcript { max-height: none; } .card, figure { break-inside: avoid; } }
"""
