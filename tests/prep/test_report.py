"""``vlprep report``: the page is self-contained, escaped, correct and deterministic."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.cli import main
from prep.inspect.report import render_report
from prep.inspect.report.charts import Histogram, doubling_histogram, number_histogram, share_histogram, svg
from prep.inspect.report.statistics import gather, notable_bins
from prep.inspect.transcript import Transcriber
from schemas.settings import BuildSettings, MediaSettings
from storage.shard_set import open_set
from tests.prep import finished as sets
from tests.prep.corpus import turn

VOID = {"meta", "img", "br", "line", "rect"}


class Page(HTMLParser):
    """Collects elements, and fails if they do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, finished: Path, tiny_checkpoint: Path) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    result = run(finished, "--out", out, "--model", tiny_checkpoint)
    assert result.exit_code == 0, result.output
    return out.read_text()


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    document = Page(page)
    names = Counter(name for name, _ in document.elements)
    assert names["script"] == names["link"] == names["iframe"] == 0
    assert names["html"] == names["body"] == names["style"] == 1
    for name, attributes in document.elements:
        assert not any(key.startswith("on") or key in ("href", "action", "srcset", "data") for key in attributes), name
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "")
    policy = next(attributes for name, attributes in document.elements if "http-equiv" in attributes)
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in page


def test_the_page_accounts_for_every_annotation(page: str, finished: Path) -> None:
    text = Page(page).text
    assert "29 annotations = 24 packed + 5 rejected + 0 not sampled" in text
    rejected = [row for row in pq.read_table(finished / "samples.parquet").to_pylist() if row["status"] == "rejected"]
    assert len(rejected) == 5
    for row in rejected:
        name = f"(id {row['id']} ) " if row["id"] else ""
        assert f"{row['codes'][0]} 1 annotations.jsonl:{row['line']} {name}{row['message']}" in text
    counts = json.loads((finished / "manifest.json").read_text())["counts"]
    for name in ("num_bins", "num_tokens", "num_targets", "num_patches", "num_images", "num_videos"):
        assert f"{counts[name]:,}" in text
    assert json.loads((finished / "manifest.json").read_text())["fingerprints"]["tokenizer"] in text


def test_the_page_has_the_statistics_of_each_dataset(page: str, finished: Path) -> None:
    (dataset,) = json.loads((finished / "manifest.json").read_text())["statistics"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in dataset["modalities"].items())
    tokens = dataset["tokens"]
    assert f"annotations {kinds} {tokens['p50']} · {tokens['p99']} · {tokens['max']}" in Page(page).text


def test_the_page_shows_texts_and_marks_what_is_trained(page: str) -> None:
    assert '<mark>An answer.</mark><mark><span class="control">&lt;|im_end|&gt;</span></mark>' in page
    assert "<span>user\nFirst </span>" in page


def test_the_same_set_gives_the_same_page(page: str, finished: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    assert run(copy, "--out", tmp_path / "again.html", "--model", tiny_checkpoint).exit_code == 0
    assert (tmp_path / "again.html").read_text() == page


def test_without_a_tokenizer_the_page_has_no_texts_and_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert run(finished, "--out", tmp_path / "report.html").exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "Their texts are missing, because the tokenizer is not available" in Page(page).text
    assert "An answer." not in page
    assert re.search(r"<mark>⟨\d+ tokens⟩</mark>", page)


def test_user_text_cannot_become_markup(tmp_path: Path, tiny_checkpoint: Path) -> None:
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>\x1b"
    Image.fromarray(np.zeros((56, 56, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    records = [
        {"id": evil, "image": "a.png", "conversations": turn(f"<image>{evil}", evil)},
        {"id": evil, "image": evil, "conversations": turn("<image>")},
    ]
    name = "<b onclick=x>&.jsonl"
    (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
    out = sets.build_set(tmp_path / name, tmp_path / "<i>&", tiny_checkpoint)
    assert run(out, "--out", tmp_path / "page.html", "--model", tiny_checkpoint).exit_code == 0
    document = Page((tmp_path / "page.html").read_text())
    assert {name for name, _ in document.elements} & {"script", "b onclick=x", "i"} <= {"i"}
    assert all(
        attributes.get("class") for name, attributes in document.elements if name == "i" and "style" not in attributes
    )
    assert [attributes["src"][:5] for name, attributes in document.elements if name == "img"] == ["data:"]
    assert document.text.count("<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>\\x1b") >= 4
    assert "transcript <b onclick=x>&" not in document.text
    assert "<b onclick=x>&.jsonl:1" in document.text
    assert "<i>&: report" in document.text


def test_wrong_use_exits_with_2_and_missing_shards_with_1(finished: Path, tmp_path: Path) -> None:
    assert run(finished, "--out", tmp_path / "none" / "page.html").exit_code == 2
    assert run(finished, "--out", tmp_path / "page.html", "--model", tmp_path).exit_code == 2
    result = run(tmp_path, "--out", tmp_path / "page.html")
    assert (result.exit_code, "holds no manifest.json" in result.stderr) == (1, True)
    assert not (tmp_path / "page.html").exists()


# Numbers


def test_statistics_count_every_row_once(corpus_file: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Half of one dataset and 2.5 times another, counted again from the ledger."""
    root = f'media_root = "{corpus_file.parent}"\nannotation_path = "{corpus_file}"\n'
    (tmp_path / "datasets.toml").write_text(f"[half]\n{root}[more]\n{root}")
    command = ["build", "half%50,more%250", "--registry", tmp_path / "datasets.toml", "--out", tmp_path / "out"]
    command += ["--model", tiny_checkpoint, "--max-length", 1200, "--workers", 1]
    assert CliRunner().invoke(main, [str(word) for word in command]).exit_code == 0
    shards = open_set(tmp_path / "out")
    statistics = gather(shards)
    rows = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert [dataset.name for dataset in statistics.datasets] == ["half", "more"]
    for dataset in statistics.datasets:
        own = [row for row in rows if row["dataset"] == dataset.name]
        statuses = Counter(row["status"] for row in own)
        assert dataset.num_annotations == len(own)
        assert dataset.num_packed == statuses["packed"]
        assert dataset.num_rejected == statuses["rejected"]
        assert dataset.num_not_sampled == statuses["not_sampled"]
        assert dataset.num_tokens == sum(row["num_tokens"] for row in own if row["status"] == "packed")
        assert dataset.num_targets == sum(row["num_targets"] for row in own if row["status"] == "packed")
    assert statistics.datasets[0].num_not_sampled == 15
    assert {reject.code: reject.num_rejected for reject in statistics.rejects} == Counter(
        code for row in rows for code in row["codes"]
    )
    assert all(len(set(reject.examples)) == len(reject.examples) <= 4 for reject in statistics.rejects)
    packed = [row for row in rows if row["status"] == "packed"]
    kinds = Counter(
        "video" if row["video_backend"] else "images" if row["num_patches"] else "text only" for row in packed
    )
    assert {name: len(values) for name, values in statistics.num_tokens.items()} == kinds
    assert sum(values.sum() for values in statistics.num_targets.values()) == shards.manifest.counts.num_targets
    assert statistics.fill.mean() == pytest.approx(shards.manifest.fill)


def test_example_bins_are_chosen_with_a_reason(finished: Path) -> None:
    shards = open_set(finished)
    rows = pq.read_table(finished / "bins.parquet").to_pylist()
    chosen = dict(notable_bins(shards, 3))
    assert len(chosen) == 3
    videos = next(index for index, reason in chosen.items() if reason == "the most videos")
    assert rows[videos]["num_videos"] == max(row["num_videos"] for row in rows)
    assert notable_bins(shards, 1) == [(videos, "the most videos")]
    assert sorted(dict(notable_bins(shards, 99))) == [row["bin"] for row in rows]


def test_long_bins_are_shortened_and_say_so(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"conversations": turn(f"{n}")}) for n in range(9)))
    out = sets.build_set(tmp_path / "many.jsonl", tmp_path / "out", tiny_checkpoint, BuildSettings())
    page = render_report(open_set(out), Transcriber(None))
    assert "And 3 more samples; vlprep show DIR --bin 0 prints all." in Page(page).text.replace("  ", " ")


# Charts


def bars(chart: Histogram) -> dict[str, list[int]]:
    return {name: counts.tolist() for name, counts in chart.counts.items()}


def test_a_number_histogram_has_at_most_32_bars_of_equal_width() -> None:
    small = number_histogram("t", "u", {"a": np.array([0, 1, 1, 5]), "b": np.array([3])})
    assert small.labels == ("0", "1", "2", "3", "4", "5")
    assert bars(small) == {"a": [1, 2, 0, 0, 0, 1], "b": [0, 0, 0, 1, 0, 0]}
    large = number_histogram("t", "u", {"a": np.array([0, 127, 128, 4096])})
    assert large.labels[0] == "0 to 255"
    assert large.labels[-1] == "4,096 to 4,351"
    assert bars(large)["a"] == [3, *[0] * 15, 1]


def test_bars_of_a_doubling_histogram_start_at_powers_of_two() -> None:
    chart = doubling_histogram("t", "u", {"a": np.array([1, 2, 3, 4, 7, 8])})
    assert chart.labels == ("1", "2 to 3", "4 to 7", "8 to 15")
    assert bars(chart)["a"] == [1, 2, 2, 1]


def test_a_share_histogram_runs_from_the_lowest_share_to_one() -> None:
    chart = share_histogram("t", "u", "bins", np.array([0.81, 0.999, 1.0]))
    assert chart.labels[0] == "80 % to 81 %"
    assert bars(chart)["bins"] == [0, 1, *[0] * 17, 2]
    assert [text for _, text in chart.ticks] == ["80 %", "84 %", "88 %", "92 %", "96 %", "100 %"]


def test_empty_charts_can_be_drawn() -> None:
    none = np.empty(0, dtype=np.int64)
    for chart in (
        number_histogram("t", "u", {"a": none}),
        doubling_histogram("t", "u", {"a": none}),
        share_histogram("t", "u", "a", none.astype(np.float64)),
    ):
        Page(svg(chart, ["c"]))


def test_bars_are_proportional_and_stacked() -> None:
    chart = number_histogram("t", "tokens", {"a": np.array([0, 0, 1, 1, 1, 1]), "b": np.array([1, 1])})
    document = Page(svg(chart, ["first", "second"]))
    rects = [attributes for name, attributes in document.elements if name == "rect"]
    assert [rect["class"] for rect in rects] == ["first", "first", "second"]
    heights = [float(rect["height"] or 0) for rect in rects]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.02)
    assert heights[2] == pytest.approx(heights[0], abs=0.02)
    assert float(rects[2]["y"] or 0) + heights[2] == pytest.approx(float(rects[1]["y"] or 0), abs=0.02)
    assert "1 tokens: 4 a, 2 b" in document.text


def test_overrides_of_a_dataset_are_shown(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "set")

    def change(manifest: dict[str, object]) -> None:
        manifest["inputs"][0]["media"]["max_pixels"] = 123456  # type: ignore[index]

    sets.change_manifest(tmp_path / "set", change)
    text = Page(render_report(open_set(tmp_path / "set"), Transcriber(None))).text
    assert "annotations: max_pixels 123456" in text
    assert f"max_pixels {MediaSettings().max_pixels}" in text
