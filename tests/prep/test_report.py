"""``vlprep report``: the page is self-contained, escaped, correct and deterministic."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from msgspec import UNSET
from PIL import Image

import storage
from prep.annotations.registry import find_sources
from prep.build.media_tally import MediaTally
from prep.cli import main
from prep.inspect.report import render_report, write_report
from prep.inspect.report.choice import PER_GROUP, _of_dataset, choose_samples
from prep.inspect.report.command import NamedInputs, build_command
from prep.inspect.report.gallery import DETAILS, caption_of, shortened
from prep.inspect.report.statistics import MODALITIES, busy_share, gather, modality_of
from prep.inspect.report.writer import MAX_BYTES, ReportRequest
from prep.inspect.transcript import Span, SpanKind, Transcriber
from schemas.errors import ConfigError
from schemas.manifest import MediaStatistics
from schemas.qwen import Grid
from schemas.settings import BuildSettings, MediaSettings
from schemas.wording import kinds_text, size_text
from storage.shard_set import open_set
from storage.urls import Url
from tests.prep import finished as sets
from tests.prep.browser import NAMES, Tab, find_browser, open_tab
from tests.prep.corpus import turn
from tests.prep.test_videos import write_video

VOID = {"meta", "img", "br", "input"}


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
        if self._open and self._open[-1] not in ("style", "script"):
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
    assert names["link"] == names["iframe"] == names["form"] == 0
    assert names["html"] == names["body"] == names["style"] == names["script"] == 1
    ids = {attributes["id"] for _, attributes in document.elements if "id" in attributes}
    for name, attributes in document.elements:
        assert not any(key.startswith("on") or key in ("action", "srcset", "data", "style") for key in attributes), name
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert "href" not in attributes or (attributes["href"] or "")[1:] in ids
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in page
    assert len(page.encode()) < MAX_BYTES


def test_the_policy_of_the_page_admits_its_own_style_and_script_alone(page: str) -> None:
    document = Page(page)
    policy = next(attributes["content"] for _, attributes in document.elements if "http-equiv" in attributes)
    hashes = {
        name: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for name in ("style", "script")
        for content in re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL)
    }
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    )


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
    kinds = kinds_text(dataset["modalities"])
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


def test_without_a_tokenizer_the_page_has_no_texts_and_page_and_terminal_say_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert run(finished, "--out", tmp_path / "report.html").exit_code == 0
    (said,) = caplog.messages
    assert said.startswith("the texts are missing: the shards do not name their model") and "--model" in said
    page = (tmp_path / "report.html").read_text()
    assert "The texts are missing, because the tokenizer is not available" in Page(page).text
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
    page = (tmp_path / "page.html").read_text()
    document = Page(page)
    assert page.count("<script") == 1
    assert {name for name, _ in document.elements} & {"b onclick=x", "i"} <= {"i"}
    assert all(attributes.get("class") for name, attributes in document.elements if name == "i")
    assert [attributes["src"][:5] for name, attributes in document.elements if name == "img"] == ["data:"]
    assert document.text.count("<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>\\x1b") >= 4
    assert "transcript <b onclick=x>&" not in document.text
    assert "<b onclick=x>&.jsonl:1" in document.text
    assert "<i>&: report" in document.text


# The command that built the set


def command_of(page: str) -> tuple[str, str]:
    """The command in a page, and the sentences below it."""
    section = page.partition('<section id="origin">')[2].partition('<div class="charts">')[0]
    command, _, notes = section.partition("</pre>")
    return html.unescape(re.sub("<[^>]*>", "", command.partition("<code>")[2])), Page(notes).text


def copied(command: str) -> Result:
    return CliRunner().invoke(main, [*shlex.split(command)[1:], "--workers", "1"])


@pytest.mark.parametrize("model_is_default", [False, True])
def test_the_command_of_a_page_builds_the_same_set(
    corpus_file: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_is_default: bool,
) -> None:
    """From a table of a registry, and from a file with a share and a media root: paths as they were given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "media").symlink_to(corpus_file.parent)
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    lists = tmp_path / "my lists"
    lists.mkdir()
    for name in ("one.jsonl", "two.jsonl"):
        shutil.copy(corpus_file, lists / name)
    (lists / "sets.toml").write_text(
        '[pair]\nannotation_path = "*.jsonl"\nmedia_root = "../media"\nsampling_rate = 0.5\n'
    )
    if model_is_default:
        monkeypatch.setattr("prep.inspect.report.command.DEFAULT_MODEL", "model")
    options = "--out sets/first --model model --max-length 1200 --seed 3 --strict-fields --max-pixels 20000 --report"
    inputs = {
        "pair%50 --registry 'my lists/sets.toml'": "pair%50 --out sets/first --registry 'my lists/sets.toml'",
        "'my lists/one.jsonl%33.3' --media-root media": "'my lists/one.jsonl%33.3' --out sets/first --media-root media",
    }
    for given, shown in inputs.items():
        shutil.rmtree("sets", ignore_errors=True)
        result = copied(f"vlprep build {given} {options}")
        assert result.exit_code == 0, result.output
        page = Path("sets/first/report.html").read_text()
        if "pair" in given:
            # Once in each table, though it has two files; and no bars that compare it with itself.
            assert page.count('data-label="dataset">pair</td>') == 4 and page.count('data-label="file">') == 2 + 3
            assert page.count('class="bar"') == 1
        command, notes = command_of(page)
        model = "" if model_is_default else " --model model"
        assert command == f"vlprep build {shown}{model} --max-length 1200 --strict-fields --seed 3 --max-pixels 20000"
        assert notes == ""
        Path("sets/first").rename("sets/before")
        result = copied(command if model else f"{command} --model model")
        assert result.exit_code == 0, result.output
        for path in Path("sets/before").iterdir():
            if path.is_file() and path.name not in ("report.html", "build_metrics.json"):
                assert path.read_bytes() == Path("sets/first", path.name).read_bytes(), path.name


def test_a_command_without_all_its_parts_says_which_are_missing(
    finished: Path, corpus_file: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Neither a set nor a page holds absolute paths."""
    shards = open_set(finished)
    settings = "--max-length 1200 --shard-bytes 1500000"
    command, notes = command_of(render_report(shards, Transcriber(None)))
    assert command == f"vlprep build PATH/annotations.jsonl --out {finished.name} --model MODEL {settings}"
    assert "Put the folder in place of PATH" in notes
    assert "in place of MODEL: the set holds the fingerprint of its tokenizer alone" in notes
    assert shards.manifest.fingerprints.tokenizer in notes
    assert "The set does not hold --media-root and --registry" in notes and "sampling_rate" not in notes
    out = tmp_path / "page.html"
    assert run(finished, "--out", out, "--model", tiny_checkpoint, "--datasets", corpus_file).exit_code == 0
    command, notes = command_of(out.read_text())
    assert command == (
        f"vlprep build PATH/annotations.jsonl --out {finished.name} --model PATH/{tiny_checkpoint.name} {settings}"
    )
    assert notes == "Put the folder in place of PATH: a page holds no absolute path."
    assert str(tmp_path.parent) not in out.read_text()
    # Half of what the build took: not the same set.
    assert run(finished, "--out", out, "--datasets", f"{corpus_file}%50", "--model", tiny_checkpoint).exit_code == 0
    assert "PATH/annotations.jsonl --out" in command_of(out.read_text())[0]


def test_the_command_of_several_datasets_has_their_names_and_shares(finished: Path) -> None:
    manifest = open_set(finished).manifest
    (one,) = manifest.inputs
    two = msgspec.structs.replace(one, dataset="pages", rate=1 / 3)
    several = msgspec.structs.replace(manifest, inputs=[one, two])
    named = NamedInputs(model="https://user:secret@host/model?signature=x")
    command = build_command(several, Url("s3://bucket/a"), named)
    assert command.text.startswith(
        "vlprep build PATH/annotations.jsonl pages%33.3333333333 --out s3://bucket/a --model"
    )
    assert "secret" not in command.text and "signature" not in command.text
    assert any("sampling_rate" in note for note in command.notes)


def test_a_page_overwrites_pages_alone(finished: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    out = tmp_path / "page.html"
    for before in (b"", b"\n<!DOCTYPE HTML>old"):
        out.write_bytes(before)
        assert run(finished, "--out", out, "--model", tiny_checkpoint, "--bin", 0).exit_code == 0
    assert out.read_text().startswith("<!doctype html>")
    shutil.copytree(finished, tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.json"
    result = run(tmp_path / "set", "--out", manifest, "--model", tiny_checkpoint)
    assert (result.exit_code, f"--out {manifest} would overwrite a file that is not an" in result.stderr) == (2, True)
    assert manifest.read_bytes() == (finished / "manifest.json").read_bytes()


def test_wrong_use_and_missing_shards_exit_with_2(finished: Path, tmp_path: Path) -> None:
    assert run(finished, "--out", tmp_path / "page.html", "--model", tmp_path).exit_code == 2
    result = run(tmp_path, "--out", tmp_path / "page.html")
    assert (result.exit_code, "holds no manifest.json" in result.stderr) == (2, True)
    assert not (tmp_path / "page.html").exists()


# In a browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    program = find_browser()
    if program is None:
        pytest.skip(f"no headless browser on this machine ({', '.join(NAMES)})")
    with open_tab(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, page: str) -> Path:
    path = tmp_path_factory.mktemp("browser") / "page.html"
    path.write_text(page)
    return path


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_nothing_is_wider_than_the_window(tab: Tab, page_file: Path, width: int) -> None:
    tab.open(page_file, width=width, dark=width == 820)
    tab.value("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert tab.value("innerWidth") == width
    assert tab.value("document.documentElement.scrollWidth") == width
    # Tables may scroll within their card, but not on a phone.
    cut_off = "node.scrollWidth > node.clientWidth + 1 && (innerWidth < 600 || !node.matches('.scroll'))"
    nodes = "document.querySelectorAll('main *:not(svg *), .top *')"
    assert tab.value(f"Array.from({nodes}).filter((node) => node.clientWidth && {cut_off}).length") == 0
    if width == 390:
        assert (
            tab.value("new Set(Array.from(document.querySelectorAll('.tiles > div'), (n) => n.offsetLeft)).size") == 2
        )
    assert tab.console == []


@pytest.mark.parametrize(("width", "columns"), [(390, 1), (800, 2), (1280, 4)])
def test_the_gallery_reads_from_left_to_right_in_full_rows(tab: Tab, page_file: Path, width: int, columns: int) -> None:
    """The four samples of a kind fill one row, two, or four."""
    tab.open(page_file, width=width)
    cards = "document.querySelectorAll('article')"
    places = tab.value(f"Array.from({cards}, (n) => [n.dataset.kind, n.offsetTop, n.offsetLeft])")
    kinds = [kind for kind, _, _ in places]
    assert kinds == ["images"] * 4 + ["video"] * 4 + ["text only"] * 4
    lefts = sorted({left for _, _, left in places})
    assert len(lefts) == columns
    assert [left for _, _, left in places] == lefts * (len(places) // columns)
    tops = [top for _, top, _ in places]
    assert tops == sorted(tops) and len(set(tops)) == len(places) // columns


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_no_name_of_a_dataset_is_broken(tab: Tab, page_file: Path, width: int) -> None:
    tab.open(page_file, width=width)
    tab.value("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    names = "Array.from(document.querySelectorAll('td.name')).filter((n) => n.textContent === 'annotations')"
    count_lines = """(n) => {
        const range = document.createRange();
        range.selectNodeContents(n);
        return range.getClientRects().length;
    }"""
    assert tab.value(f"{names}.map({count_lines})") == [1] * 4


def test_the_page_is_light_or_dark_as_the_reader_prefers(tab: Tab, page_file: Path) -> None:
    """Text has a contrast of at least 4.5 to 1 in both (WCAG 2.2, 1.4.3)."""
    colours = {}
    for dark in (False, True):
        tab.open(page_file, width=800, dark=dark)
        for name, node in {"text": "body", "soft": ".soft", "trained": "mark"}.items():
            style = f"getComputedStyle(document.querySelector('{node}'))"
            ground = f"getComputedStyle(document.querySelector('{'mark' if name == 'trained' else 'body'}'))"
            colours[dark, name] = (tab.value(f"{style}.color"), tab.value(f"{ground}.backgroundColor"))
    assert all(colours[False, name] != colours[True, name] for name in ("text", "soft", "trained"))
    assert {pair: contrast(*pair) for pair in colours.values() if contrast(*pair) < 4.5} == {}


def contrast(colour: str, ground: str) -> float:
    """Of two CSS colours, as WCAG defines it."""
    luminances = []
    for text in (colour, ground):
        values = [int(part) / 255 for part in re.findall(r"\d+", text)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    low, high = sorted(luminances)
    return (high + 0.05) / (low + 0.05)


def test_a_script_of_others_does_not_run(tab: Tab, page: str, tmp_path: Path) -> None:
    """The policy admits only the page's own script: with another beside it, the browser refuses that one."""
    path = tmp_path / "changed.html"
    path.write_text(page.replace("</main>", "</main><script>document.title = 'changed'</script>"))
    tab.open(path, width=800)
    assert tab.value("document.title").endswith(": report")
    assert tab.value("document.getElementById('filter').hidden") is False
    assert any("Content Security Policy" in message for message in tab.console)
    tab.console.clear()


def test_every_script_is_shown_as_it_is_written(tab: Tab, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """In ids, names of datasets and transcripts, and by the search of the page."""
    texts = ["图里有什么？", "写真には何がありますか", "무엇이 있나요", "ماذا في الصورة", "क्या है 🦓"]
    file = tmp_path / "问答.jsonl"
    lines = [json.dumps({"id": f"例-{index}", "conversations": turn(text)}) for index, text in enumerate(texts)]
    file.write_text("\n".join(lines))
    shards = sets.build_set(file, tmp_path / "集", tiny_checkpoint)
    page = tmp_path / "page.html"
    choice = [word for index in range(5) for word in ("--sample", f"问答:{index}")]
    assert run(shards, "--out", page, "--model", tiny_checkpoint, *choice).exit_code == 0
    tab.open(page, width=390)
    shown = tab.value("Array.from(document.querySelectorAll('.transcript'), (n) => n.innerText)")
    assert all(text in transcript for text, transcript in zip(texts, shown, strict=True))
    assert tab.value("document.querySelector('h1').innerText") == "集"
    assert tab.value("document.querySelector('.group h3').innerText") == "问答"
    tab.value("document.getElementById('by-text').value = '図 何がありますか'.slice(2)")
    tab.value("document.getElementById('by-text').dispatchEvent(new Event('input'))")
    visible = "Array.from(document.querySelectorAll('article')).filter((n) => n.checkVisibility())"
    assert tab.value(f"{visible}.map((n) => n.querySelector('bdi').innerText)") == ["例-1"]
    # Fonts with Chinese characters of each system, also where text is set in a fixed width.
    for node in ("body", ".transcript"):
        family = tab.value(f"getComputedStyle(document.querySelector('{node}')).fontFamily")
        assert all(name in family for name in ("PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC"))


def test_the_script_filters_samples_and_rejects(tab: Tab, page_file: Path) -> None:
    tab.open(page_file, width=1440)
    visible = "Array.from(document.querySelectorAll('[data-item]')).filter((node) => node.checkVisibility())"

    def filtered(**values: str) -> list[list[str]]:
        for name in ("dataset", "kind", "code", "text"):
            value = json.dumps(values.get(name, ""))
            tab.value(f"document.getElementById('by-{name}').value = {value}")
        tab.value("document.getElementById('by-text').dispatchEvent(new Event('input'))")
        shown: list[list[str]] = tab.value(
            f"{visible}.map((node) => [node.dataset.item, node.dataset.kind + node.dataset.code])"
        )
        return shown

    num_samples = tab.value("document.querySelectorAll('article').length")
    # Rejects are folded until a filter is set.
    assert len(filtered()) == num_samples
    assert filtered(kind="video") == [["sample", "video"]] * PER_GROUP
    assert filtered(code="tag_mismatch") == [["reject", "tag_mismatch"]]
    assert filtered(text="gets zebra") == []
    assert filtered(text="GETS brighter.") == [["sample", "video"]] * PER_GROUP
    assert len(filtered(dataset="annotations")) > num_samples
    tab.value("document.querySelector('article').dataset.dataset = 'other'")
    assert filtered(dataset="annotations", kind="images") == [["sample", "images"]] * (PER_GROUP - 1)
    tab.value("document.querySelector('article').dataset.dataset = 'annotations'")
    filtered(dataset="annotations")
    assert tab.value("document.getElementById('shown').textContent").startswith(
        f"{num_samples} of {num_samples} samples"
    )
    assert tab.console == []


def test_without_scripts_everything_is_there_but_the_filter(tab: Tab, page_file: Path) -> None:
    tab.open(page_file, width=820, scripts=False)
    layout = tab.call("DOM.getDocument", depth=-1)
    assert layout["root"]["children"]
    metrics = tab.call("Page.getLayoutMetrics")["cssContentSize"]
    tab.open(page_file, width=820)
    with_filter = tab.call("Page.getLayoutMetrics")["cssContentSize"]
    filter_height = tab.value("document.getElementById('filter').offsetHeight")
    assert filter_height > 0
    assert 0 <= with_filter["height"] - metrics["height"] - filter_height < 40
    assert tab.console == []


# Numbers


def test_statistics_count_every_row_once(corpus_file: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Half of one dataset and 2.5 times another, counted again from the ledger."""
    root = f'media_root = "{corpus_file.parent}"\nannotation_path = "{corpus_file}"\n'
    (tmp_path / "datasets.toml").write_text(f"[half]\n{root}[more]\n{root}")
    command = ["build", "half%50,more%250", "--registry", tmp_path / "datasets.toml", "--out", tmp_path / "out"]
    command += ["--model", tiny_checkpoint, "--max-length", 1200, "--workers", 1]
    assert CliRunner().invoke(main, [str(word) for word in command]).exit_code == 0
    shards = open_set(tmp_path / "out")
    assert render_report(shards, Transcriber(None)).count('class="bar"') == 1 + 3
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


def test_ranks_that_take_random_bins_wait_for_the_slowest_of_them() -> None:
    values = np.array([1, 2, 3, 4])
    largest_of_two = np.maximum.outer(values, values).mean()
    assert busy_share(values, 1) == pytest.approx(1)
    assert busy_share(values, 2) == pytest.approx(values.mean() / largest_of_two)
    assert busy_share(np.array([5, 5, 5]), 512) == pytest.approx(1)
    assert busy_share(np.zeros(3, dtype=np.int64), 8) == 1


def test_sizes_below_a_tenth_of_a_megabyte_are_kilobytes() -> None:
    sizes = (512, 99_949, 100_000, 1_500_000, 2_500_000_000, 3 * 10**12)
    assert [*map(size_text, sizes)] == ["0.5 kB", "99.9 kB", "0.1 MB", "1.5 MB", "2.5 GB", "3 TB"]


def test_shrunken_images_frames_and_repetitions_are_counted(tmp_path: Path, tiny_checkpoint: Path) -> None:
    for name, size in (("small.png", (56, 56)), ("large.png", (1120, 840)), ("tiny.png", (28, 28))):
        Image.new("RGB", size).save(tmp_path / name)
    write_video(tmp_path / "clip.mp4", 12, 2)
    talks = [("small", "a"), ("small", "b"), ("large", "a"), ("small", "a"), ("tiny", "c"), ("small", "a")]
    records = [{"image": f"{name}.png", "conversations": turn(f"<image>{text}")} for name, text in talks]
    records += [{"video": "clip.mp4", "conversations": turn("<video>a")}, {"conversations": turn("a")}]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = BuildSettings(media=MediaSettings(min_pixels=56 * 56, max_pixels=560 * 420))
    (dataset,) = open_set(
        sets.build_set(tmp_path / "talk.jsonl", tmp_path / "out", tiny_checkpoint, settings)
    ).manifest.statistics
    media = dataset.media
    assert isinstance(media, MediaStatistics)
    assert (media.num_images, media.num_shrunk, media.num_enlarged) == (6, 1, 1)
    assert media.kept_percent is not None and (media.kept_percent.min, media.kept_percent.max) == (25, 25)
    assert media.frames is not None and media.frames.total == 4
    # Of the text with an image: a is repeated three times. The small image: three times. Both together: twice.
    assert (media.num_same_text, media.num_same_media, media.num_same_sample) == (3, 3, 2)
    page = Page(render_report(open_set(tmp_path / "out"), Transcriber(None))).text
    assert "talk 6 16.67 % median 25 %, least 25 % 16.67 % 4 to 4, median 4 3 3 2" in page


def test_copies_of_an_annotation_are_no_repetitions() -> None:
    tally = MediaTally()
    columns = {
        "record": pa.array([4, 4, 5], pa.int64()),
        "kept_percents": pa.array([[100], [100], []], pa.list_(pa.int32())),
        "frames": pa.array([[], [], [8]], pa.list_(pa.int32())),
        "text_hash": pa.array([1, 1, 2], pa.uint64()),
        "media_hash": pa.array([7, 7, 8], pa.uint64()),
    }
    tally.add(pa.table(columns))
    statistics = tally.statistics()
    assert isinstance(statistics, MediaStatistics)
    assert (statistics.num_images, statistics.num_same_text, statistics.num_same_sample) == (2, 0, 0)
    assert MediaTally().statistics() is UNSET


# The choice of samples


def test_every_dataset_and_modality_shows_its_median_its_longest_and_its_most_visual_sample(finished: Path) -> None:
    choices = choose_samples(open_set(finished))
    rows = [row for row in pq.read_table(finished / "samples.parquet").to_pylist() if row["status"] == "packed"]
    by_record = {row["record"]: row for row in rows}
    assert len({choice.record for choice in choices}) == len(choices)
    for modality in MODALITIES:
        group = [row for row in rows if modality == kind_of(row)]
        own = [choice for choice in choices if choice.modality == modality]
        assert len(own) == min(PER_GROUP, len(group))
        reasons = {reason: choice.record for choice in own for reason in choice.reason.split(", ")}
        lengths = sorted(row["num_tokens"] for row in group)
        assert by_record[reasons["median length"]]["num_tokens"] == lengths[(len(lengths) - 1) // 2]
        assert by_record[reasons["longest"]]["num_tokens"] == lengths[-1]
        most = ("most trained tokens", "num_targets") if modality == "text only" else ("most visual", "num_patches")
        assert by_record[reasons[most[0]]][most[1]] == max(row[most[1]] for row in group)
        assert "random" in reasons


def packed_table(num_tokens: list[int], num_patches: list[int]) -> pa.Table:
    """Packed samples of one dataset, each of an annotation of its own."""
    rows = range(len(num_tokens))
    columns = {
        "dataset": ["one"] * len(num_tokens),
        "record": list(rows),
        "bin": [0] * len(num_tokens),
        "slot": list(rows),
        "num_tokens": num_tokens,
        "num_targets": [1] * len(num_tokens),
        "num_patches": num_patches,
        "video_backend": pa.nulls(len(num_tokens), pa.string()),
    }
    return pa.table(columns)


@pytest.mark.parametrize(
    ("num_tokens", "num_patches"),
    [
        ([10] * 9, [4] * 9),
        ([10] * 9, [0] * 9),
        ([1, 1, 1, 1, 1, 1, 9], [4, 4, 4, 4, 4, 4, 400]),
        ([5, 5, 5, 5], [4, 4, 4, 4]),
        (list(range(1, 301)), list(range(4, 304))),
        ([3, 2, 1], [4, 4, 4]),
        ([7], [4]),
    ],
)
def test_four_different_samples_are_shown_also_where_several_reasons_name_the_same(
    num_tokens: list[int], num_patches: list[int]
) -> None:
    table = packed_table(num_tokens, num_patches)
    chosen = _of_dataset(table, modality_of(table), "one")
    rows = [row for row, _ in chosen]
    assert len(set(rows)) == len(rows) == min(PER_GROUP, len(num_tokens))
    reasons = ", ".join(reason for _, reason in chosen).split(", ")
    assert reasons[0] == "median length" and {"longest"} < set(reasons)
    assert reasons.count("random") == len(rows) - len({row for row, reason in chosen if reason != "random"})


def kind_of(row: dict[str, object]) -> str:
    return "video" if row["video_backend"] else "images" if row["num_patches"] else "text only"


def test_named_bins_and_samples_replace_the_choice(finished: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    row = next(row for row in pq.read_table(finished / "samples.parquet").to_pylist() if row["bin"] == 1)
    shards = open_set(finished)
    sample = f"annotations:{row['record']}"
    assert [choice.record for choice in choose_samples(shards, samples=[sample])] == [row["record"]]
    whole = choose_samples(shards, bins=[1])
    assert [choice.slot for choice in whole] == list(range(sets.place_of(finished, 1)["num_samples"]))
    both = choose_samples(shards, bins=[1], samples=[sample])
    assert len(both) == len(whole) and both[0].reason == "chosen"
    out = tmp_path / "new" / "folder" / "page.html"
    assert run(finished, "--out", out, "--model", tiny_checkpoint, "--sample", sample).exit_code == 0
    articles = [attributes for name, attributes in Page(out.read_text()).elements if name == "article"]
    assert len(articles) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": [99]}, "has no bin 99"),
        ({"samples": ["annotations"]}, "is not dataset:record, such as annotations:0"),
        ({"samples": ["other:0"]}, "no packed sample of record 0 of dataset 'other'. Its datasets: annotations"),
        ({"samples": ["annotations:0"]}, "no packed sample of record 0"),
    ],
)
def test_a_bin_or_sample_that_is_not_there_is_wrong_use(
    finished: Path, arguments: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose_samples(open_set(finished), **arguments)


def test_a_page_can_be_uploaded(finished: Path) -> None:
    url = Url("memory://pages/of/mine.html")
    assert write_report(finished, url, ReportRequest()).startswith(f"{url}: ")
    assert storage.read(url).startswith(b"<!doctype html>")


# Sizes before resizing, and images of rejects


def test_with_its_datasets_a_page_has_original_sizes_and_images_of_rejects(
    finished: Path, corpus_file: Path, tiny_checkpoint: Path
) -> None:
    sources = tuple(find_sources(str(corpus_file), registry=None, media_root=None, media=MediaSettings()))
    shards = open_set(finished)
    page = render_report(shards, Transcriber(None), ReportRequest(sources=sources))
    with Image.open(corpus_file.parent / "0.png") as image:
        assert f"{image.width}×{image.height} →" in page
    items = re.findall(r'<li data-item="reject".*?</li>', page, re.DOTALL)
    with_image = [re.search(r'data-code="(\w+)"', item)[1] for item in items if "<img" in item]  # type: ignore[index]
    assert with_image == ["tag_mismatch"]


def test_other_annotation_files_than_those_of_the_build_are_refused(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "annotations.jsonl"
    other.write_text('{"conversations": []}\n' * 29)
    result = run(finished, "--out", tmp_path / "page.html", "--datasets", other)
    assert (result.exit_code, "is not the one that these shards were built from" in result.stderr) == (2, True)
    other.rename(tmp_path / "talk.jsonl")
    result = run(finished, "--out", tmp_path / "page.html", "--datasets", tmp_path / "talk.jsonl")
    assert (result.exit_code, "talk is no dataset of these shards" in result.stderr) == (2, True)


def test_a_caption_has_the_size_before_and_after_resizing() -> None:
    assert caption_of(Grid(1, 4, 6), 0, None) == "84×56 pixels, 6 tokens"
    assert caption_of(Grid(1, 4, 6), 0, (84, 57)) == "84×57 → 84×56 pixels, 6 tokens"
    assert caption_of(Grid(1, 4, 6), 0, (168, 112)) == "168×112 → 84×56 pixels (25% of the pixels), 6 tokens"
    assert caption_of(Grid(2, 4, 6), 1, (42, 28)) == (
        "video, 4 frames of 42×28 → 84×56 pixels (4.0 times the pixels), 12 tokens"
    )


# Size


def test_long_texts_are_shortened_and_say_so() -> None:
    spans = [
        Span(SpanKind.TEXT, "a" * 1000, False),
        Span(SpanKind.TEXT, "b" * 90, True),
        Span(SpanKind.TEXT, "c", True),
    ]
    pieces = list(shortened(spans, 200))
    assert [len(set(piece.text) & set("abc")) > 0 for piece in pieces] == [True, True, True]
    assert "⟨… 900 characters …⟩" in pieces[0].text
    assert (pieces[1].text, pieces[1].is_trained) == ("b" * 90, True)
    assert list(shortened(spans, 20))[1].text == " ⟨… 91 more characters⟩"
    assert [piece.text for piece in shortened(spans[1:], 6000)] == ["b" * 90, "c"]


def test_a_page_that_would_be_too_large_shows_less_of_each_sample(
    finished: Path, tiny_checkpoint: Path, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.inspect.report.writer.MAX_BYTES", 0)
    monkeypatch.setattr("prep.inspect.report.writer.MAX_SAMPLES", 5)
    monkeypatch.setattr("prep.inspect.report.page._MAX_FILES", 2)
    smallest = render_report(open_set(finished), Transcriber(None))
    widths = [int(attributes["width"] or 0) for name, attributes in Page(smallest).elements if name == "img"]
    assert widths and max(widths) <= DETAILS[-1].side
    assert len(smallest) < len(page)
    assert smallest.count("<article") == 5
    kinds = re.findall(r'<article [^>]*data-kind="([^"]*)"', " ".join(smallest.split()))
    assert kinds == ["images", "images", "video", "video", "text only"]
    assert f"{page.count('<article') - 5} more samples would not fit; name those that you want" in smallest
    num_files = len(list(finished.glob("bins-*.tar"))) + 2
    assert f"And {num_files - 2} more, which manifest.json lists." in smallest


def test_a_page_of_noise_stays_below_three_megabytes(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """At the first detail, four samples with six such images each would take about 5 MB."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(4):
        names = [f"{index}-{image}.png" for image in range(6)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (392, 392, 3), dtype=np.uint8)).save(tmp_path / name, compress_level=0)
        records.append({"images": names, "conversations": turn("<image>" * 6, "字" * 9000)})
    (tmp_path / "noise.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = BuildSettings(max_length=16384)
    shards = open_set(sets.build_set(tmp_path / "noise.jsonl", tmp_path / "out", tiny_checkpoint, settings))
    page = render_report(shards, Transcriber(None))
    widths = {int(attributes["width"] or 0) for name, attributes in Page(page).elements if name == "img"}
    assert len(page.encode()) < 3_000_000 and page.count("<article") == 4
    assert max(widths) in [detail.side for detail in DETAILS[1:]]


def test_of_many_datasets_the_header_names_a_few_and_the_unused_fields_are_folded(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "set")

    def change(manifest: dict[str, Any]) -> None:
        for part, extra in (("inputs", {}), ("statistics", {"unused_fields": {"img": 1}})):
            first = manifest[part][0]
            manifest[part] += [{**first, "dataset": f"d{index}", **extra} for index in range(1, 10)]

    sets.change_manifest(tmp_path / "set", change)
    page = render_report(open_set(tmp_path / "set"), Transcriber(None))
    assert "annotations, d1, d2, d3, d4, d5, d6, d7 and 2 more · set" in Page(page).text
    assert "<details><summary>Fields not used</summary>" in page and page.count("fields not used: img ×1") == 9


def test_overrides_of_a_dataset_are_shown(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "set")

    def change(manifest: dict[str, object]) -> None:
        manifest["inputs"][0]["media"]["max_pixels"] = 123456  # type: ignore[index]

    sets.change_manifest(tmp_path / "set", change)
    text = Page(render_report(open_set(tmp_path / "set"), Transcriber(None))).text
    assert "annotations: max_pixels 123456" in text
    assert f"max_pixels {MediaSettings().max_pixels}" in text
