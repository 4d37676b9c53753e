"""Every format and spelling of the same annotations gives the same samples, through a complete build.

All variants are datasets of one build, which is compared sample by sample with a build of the canonical spelling.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from prep.annotations import parquet_records
from prep.annotations.registry import find_sources
from prep.build.pipeline import BuildRequest, build
from prep.engines import SerialEngine
from schemas.manifest import Manifest
from schemas.settings import BuildSettings, MediaSettings
from tests.prep.packed import Packed, assert_same, packed_samples
from tests.prep.test_images import random_image
from tests.prep.test_videos import write_video

pytestmark = pytest.mark.slow

SETTINGS = BuildSettings(
    media=MediaSettings(max_pixels=40 * 784, video_min_frame_pixels=4 * 784, video_max_frame_pixels=12 * 784),
    max_length=1024,
)

Record = dict[str, Any]

RECORDS: list[Record] = [
    {"id": "text", "conversations": ['Hi\nthere, "you" \\ é 你好 \u2028', "Hello!\t👋"]},
    {"id": "one", "images": ["a.png"], "conversations": ["<image>\nWhat is this?", "A cat."]},
    {"id": "behind", "images": ["b.jpg"], "conversations": ["What is <image>", "x", "Sure?", "Yes."]},
    {"id": "three", "images": ["a.png", "b.jpg", "a.png"], "conversations": ["<image><image> or <image>?", "None."]},
    {
        "id": "later",
        "images": ["sub/c.webp", "a.png"],
        "conversations": ["Hello", "Hi.", "And <image>?", "A dog.", "\n<image>", "A cat."],
    },
    {"id": "clip", "videos": ["v.mp4"], "conversations": ["What happens here: <video>\n", "It gets brighter."]},
    {
        "id": "mixed",
        "images": ["a.png"],
        "videos": ["v.mp4", "w.mp4"],
        "conversations": ["<video> and <image>", "One.", "then <video>", "Two."],
    },
    {"id": "system", "system": "Answer <briefly>.", "images": ["b.jpg"], "conversations": ["<image>", "Ok."]},
    {"id": 77, "conversations": ["A number", "as id."]},
]
"""The annotations: ``conversations`` alternates questions and answers. Writers below spell them."""

ONLY_IMAGES = [record for record in RECORDS if "videos" not in record and "system" not in record]


def media_fields(record: Record) -> Record:
    return {name: record[name] for name in ("images", "videos") if name in record}


def turns(record: Record, role: str, value: str, names: tuple[str, str]) -> list[Record]:
    messages = [{role: names[index % 2], value: text} for index, text in enumerate(record["conversations"])]
    return [{role: "system", value: record["system"]}, *messages] if "system" in record else messages


def canonical(record: Record) -> Record:
    spelled = turns(record, "from", "value", ("human", "gpt"))
    return {"id": record["id"], **media_fields(record), "conversations": spelled}


def as_messages(record: Record) -> Record:
    return {"id": record["id"], "messages": turns(record, "role", "content", ("user", "assistant"))} | media_fields(
        record
    )


def with_singular_fields(record: Record) -> Record:
    """``image`` and ``video``: a string for one medium, a list for several."""
    media = {name[:-1]: names[0] if len(names) == 1 else names for name, names in media_fields(record).items()}
    return {"conversations": canonical(record)["conversations"], **media, "id": record["id"]}


def with_parts(record: Record, named: bool) -> Record:
    """Content as a list of parts, media named in them or in the record's fields."""
    names = {kind: iter(record.get(f"{kind}s", [])) for kind in ("image", "video")}
    spelled = as_messages(record)
    for message in spelled["messages"]:
        if message["role"] != "user":
            message["content"] = [{"type": "text", "text": message["content"]}]
            continue
        parts: list[Record] = []
        rest = message["content"]
        while rest:
            at, tag = min((rest.find(tag) % (len(rest) + 1), tag) for tag in ("<image>", "<video>"))
            if at:
                parts.append({"type": "text", "text": rest[:at]})
            if at < len(rest):
                kind = tag.strip("<>")
                parts.append({"type": kind, kind: next(names[kind])} if named else {"type": kind})
            rest = rest[at + len(tag) :]
        message["content"] = parts
    return {name: value for name, value in spelled.items() if not named or name in ("id", "messages")}


SPELLINGS: dict[str, Callable[[Record], Record]] = {
    "canonical": canonical,
    "singular fields": with_singular_fields,
    "messages": as_messages,
    "messages, from and value": lambda r: {
        "id": r["id"],
        "messages": turns(r, "from", "value", ("human", "gpt")),
        **media_fields(r),
    },
    "conversations, role and content": lambda r: {
        "id": r["id"],
        **media_fields(r),
        "conversations": turns(r, "role", "content", ("human", "gpt")),
    },
    "user and assistant": lambda r: {
        "id": r["id"],
        **media_fields(r),
        "conversations": turns(r, "from", "value", ("user", "assistant")),
    },
    "mixed roles": lambda r: {
        "id": r["id"],
        **media_fields(r),
        "conversations": turns(r, "from", "value", ("user", "gpt")),
    },
    "parts with names": lambda r: with_parts(r, named=True),
    "parts and fields": lambda r: with_parts(r, named=False),
    "other fields and nulls": lambda r: {
        "source": "somewhere",
        "score": 0.5,
        "nested": {"conversations": [1, {"messages": None}]},
        "image": None,
        "video": None,
        "images": None,
        "videos": None,
        **canonical(r),
        "metadata": ["ü"],
    },
}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    (folder / "sub").mkdir()
    random_image(120, 90, seed=1).save(folder / "a.png")
    random_image(60, 200, seed=2).save(folder / "b.jpg")
    random_image(90, 90, "RGBA", seed=3).save(folder / "sub" / "c.webp", lossless=True)
    write_video(folder / "v.mp4", 12, 2)
    write_video(folder / "w.mp4", 5, 1)
    return folder


def table(dataset: str, files: list[Path], media: Path) -> str:
    """Lines of a registry."""
    paths = json.dumps([str(file) for file in files])
    return f"[{dataset}]\nannotation_path = {paths}\nmedia_root = {json.dumps(str(media))}\n"


def build_datasets(
    expression: str, registry: Path, model: Path, out: Path, settings: BuildSettings = SETTINGS
) -> Manifest:
    """Build without tolerating a single reject."""
    sources = find_sources(expression, registry=registry, media_root=None, media=settings.media)
    request = BuildRequest(
        sources=tuple(sources), out=out, settings=settings, model=str(model), max_rejected=Fraction(0)
    )
    return build(request, SerialEngine())


def build_file(
    file: Path, media: Path, model: Path, out: Path, *, share: str = "", settings: BuildSettings = SETTINGS
) -> Manifest:
    """Build one annotation file as the dataset ``d``."""
    registry = out.parent / f"{out.name}.toml"
    registry.write_text(table("d", [file], media))
    return build_datasets(f"d{share}", registry, model, out, settings)


def write_jsonl(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(media: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Packed]:
    folder = tmp_path_factory.mktemp("formats-expected")
    path = write_jsonl(folder / "a.jsonl", [canonical(record) for record in RECORDS])
    build_file(path, media, tiny_checkpoint, folder / "out")
    result = {name: samples[0] for name, samples in packed_samples(folder / "out").items() if "/" not in name}
    assert set(result) == {str(record["id"]) for record in RECORDS}
    return result


def test_the_samples_are_what_their_annotations_say(expected: dict[str, Packed]) -> None:
    """Checks the reference: media are in sequence order, with the pixels of their own files."""
    a, video = expected["one"].media[0], expected["clip"].media[0]
    assert [kind for kind, _, _ in expected["mixed"].media] == [1, 0, 1]
    assert (expected["mixed"].media[0][2] == video[2]).all()
    assert (expected["mixed"].media[1][2] == a[2]).all()
    first, second, third = (frames for _, _, frames in expected["three"].media)
    assert (first == third).all() and first.shape != second.shape
    assert expected["text"].media == ()


def as_texts(record: Record) -> Record:
    """Exchanges of a question and an answer."""
    texts = record["conversations"]
    exchanges = [{"user": q, "assistant": a, "source": "s"} for q, a in zip(texts[::2], texts[1::2])]
    return {"id": record["id"], "images": record.get("images", []), "texts": exchanges}


def _packed(records: list[Record]) -> list[Any]:
    """Some records joined into lists, as the upstream tool packs them."""
    return [records[0], records[1:4], records[4:5], *records[5:7], records[7:]]


FILES: dict[str, Callable[[list[Record]], bytes]] = {
    "one-line.json": lambda r: json.dumps(r).encode(),
    "indented.json": lambda r: json.dumps(r, indent=4, ensure_ascii=False).encode(),
    "bom.json": lambda r: b"\xef\xbb\xbf\n " + json.dumps(r, indent=1).encode() + b"\n\n",
    "one.jsonl": lambda r: "\n".join(map(json.dumps, r)).encode(),
    "crlf.jsonl": lambda r: "\r\n\r\n".join(map(json.dumps, r)).encode() + b"\r\n",
    "array.jsonl": lambda r: json.dumps(r).encode(),
    "lines.json": lambda r: "\n".join(map(json.dumps, r)).encode(),
    "a.jsonl.gz": lambda r: gzip.compress("\n".join(map(json.dumps, r)).encode()),
    "members.jsonl.gz": lambda r: b"".join(gzip.compress(json.dumps(record).encode() + b"\n") for record in r),
    "a.json.gz": lambda r: gzip.compress(json.dumps(r, indent=2).encode()),
    "a.jsonl.zst": lambda r: zstandard.compress("\n".join(map(json.dumps, r)).encode()),
    "frames.jsonl.zst": lambda r: b"".join(zstandard.compress(json.dumps(record).encode() + b"\n") for record in r),
    "a.json.zst": lambda r: zstandard.compress(json.dumps(r).encode()),
    "packed.json": lambda r: json.dumps(_packed(r)).encode(),
    "packed.jsonl": lambda r: "\n".join(map(json.dumps, _packed(r))).encode(),
    "packed.jsonl.gz": lambda r: gzip.compress("\n".join(map(json.dumps, _packed(r))).encode()),
}


def write_parts(folder: Path) -> list[Path]:
    """The records in four files of different formats, sorted by name."""
    records = [canonical(record) for record in RECORDS]
    (folder / "deep").mkdir()
    (folder / "deep" / "part-1.json").write_text(json.dumps(records[:2]))
    write_jsonl(folder / "deep" / "part-2.jsonl", records[2:5])
    (folder / "deep" / "part-3.jsonl.gz").write_bytes(gzip.compress(json.dumps(records[5]).encode()))
    pq.write_table(plain_table(RECORDS[6:]), folder / "deep" / "part-4.parquet")
    return sorted((folder / "deep").iterdir())


# Parquet


def plain_table(records: list[Record]) -> pa.Table:
    """The columns of the canonical spelling."""
    rows = [{**canonical(record), "id": str(record["id"])} for record in records]
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    names = pa.list_(pa.string())
    schema = pa.schema([("id", pa.string()), ("conversations", pa.list_(turn)), ("images", names), ("videos", names)])
    return pa.Table.from_pylist(rows, schema=schema)


EMBEDDED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def embedded(media: Path, names: list[str], *, path: bool = True) -> list[Record]:
    return [{"bytes": (media / name).read_bytes(), "path": name if path else None} for name in names]


def messages_table(records: list[Record], media: Path) -> pa.Table:
    """``messages``, and media inside as Hugging Face datasets store them; both media columns in every row."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    rows = [
        {
            "id": str(record["id"]),
            "images": embedded(media, record.get("images", [])),
            "videos": embedded(media, record.get("videos", [])),
            "messages": as_messages(record)["messages"],
        }
        for record in records
    ]
    schema = pa.schema(
        [
            ("images", pa.list_(EMBEDDED)),
            ("videos", pa.list_(EMBEDDED)),
            ("messages", pa.list_(message)),
            ("id", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def parts_table(records: list[Record], media: Path) -> pa.Table:
    """``messages`` whose content is a list of parts, each with all keys, as Arrow must have them."""
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    rows = [
        {
            "id": str(record["id"]),
            "images": embedded(media, record.get("images", []), path=False),
            "videos": embedded(media, record.get("videos", []), path=False),
            "messages": with_parts(record, named=False)["messages"],
        }
        for record in records
    ]
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("images", pa.list_(EMBEDDED)),
            ("videos", pa.list_(EMBEDDED)),
            ("messages", pa.list_(message)),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def texts_table(records: list[Record], media: Path, *, with_id: bool = True) -> pa.Table:
    """As FineVision and the Cauldron have it, with columns that are not read."""
    exchange = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])
    rows = [
        {
            "id": str(record["id"]),
            "images": embedded(media, record.get("images", []), path=False),
            "texts": [
                {"user": q, "assistant": a, "source": "s"}
                for q, a in zip(record["conversations"][::2], record["conversations"][1::2])
            ],
            "relevance_ratings": [1, 2],
        }
        for record in records
    ]
    fields = [
        ("images", pa.list_(EMBEDDED)),
        ("texts", pa.list_(exchange)),
        ("relevance_ratings", pa.list_(pa.int64())),
        *([("id", pa.string())] if with_id else []),
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def one_medium_table(records: list[Record], media: Path, kind: pa.DataType) -> pa.Table:
    """Columns ``image`` and ``video`` of at most one medium: a struct, or bare bytes."""

    def column(record: Record, name: str) -> Any:
        values = embedded(media, record.get(name, []))
        return None if not values else values[0] if kind == EMBEDDED else values[0]["bytes"]

    rows = [
        {
            "id": str(record["id"]),
            "image": column(record, "images"),
            "video": column(record, "videos"),
            "conversations": canonical(record)["conversations"],
        }
        for record in records
    ]
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema([("id", pa.large_string()), ("image", kind), ("video", kind), ("conversations", pa.list_(turn))])
    return pa.Table.from_pylist(rows, schema=schema)


ONE_MEDIUM = [record for record in RECORDS if len(record.get("images", [])) <= 1 and len(record.get("videos", [])) <= 1]

PARQUET: dict[str, tuple[Callable[[Path], pa.Table], list[Record]]] = {
    "plain columns": (lambda media: plain_table(RECORDS), RECORDS),
    "messages with media inside": (lambda media: messages_table(RECORDS, media), RECORDS),
    "parts with media inside": (lambda media: parts_table(RECORDS, media), RECORDS),
    "texts with images inside": (lambda media: texts_table(ONLY_IMAGES, media), ONLY_IMAGES),
    "one image or video inside": (lambda media: one_medium_table(ONE_MEDIUM, media, EMBEDDED), ONE_MEDIUM),
    "bare bytes": (lambda media: one_medium_table(ONE_MEDIUM, media, pa.large_binary()), ONE_MEDIUM),
}


def paths_table(media: Path) -> pa.Table:
    """Media columns as Hugging Face datasets have them, with paths only."""
    table = messages_table(RECORDS, media)
    rows = table.to_pylist()
    for row in rows:
        for medium in (*row["images"], *row["videos"]):
            medium["bytes"] = None
    return pa.Table.from_pylist(rows, schema=table.schema)


# All variants are datasets of one build.


@dataclass(frozen=True)
class Variant:
    """Files (or a pattern) that hold ``records`` in some way, and whether these need files below the media root."""

    files: list[Path]
    records: list[Record]
    needs_media: bool = True


VARIANTS = [
    *(f"spelling: {name}" for name in SPELLINGS),
    "spelling: absolute paths",
    "spelling: texts",
    *(f"file: {name}" for name in FILES),
    "a list of files",
    "a glob, in the order of names",
    *(f"parquet: {name}, {rows} rows in a group" for name in PARQUET for rows in (1, 4, 100)),
    "parquet: paths without bytes",
]


def write_variants(folder: Path, media: Path) -> dict[str, Variant]:
    """Write the files of all variants."""
    variants: dict[str, Variant] = {}

    def jsonl(name: str, records: list[Record], of: list[Record] = RECORDS) -> None:
        variants[name] = Variant([write_jsonl(folder / f"{len(variants)}.jsonl", records)], of)

    for name, spell in SPELLINGS.items():
        jsonl(f"spelling: {name}", [spell(record) for record in RECORDS])
    absolute = [canonical(record) for record in RECORDS]
    for record in absolute:
        record.update({field: [str(media / name) for name in names] for field, names in media_fields(record).items()})
    jsonl("spelling: absolute paths", absolute)
    jsonl("spelling: texts", [as_texts(record) for record in ONLY_IMAGES], ONLY_IMAGES)
    for name, content in FILES.items():
        (folder / name).write_bytes(content([canonical(record) for record in RECORDS]))
        variants[f"file: {name}"] = Variant([folder / name], RECORDS)
    variants["a list of files"] = Variant(write_parts(folder), RECORDS)
    variants["a glob, in the order of names"] = Variant([folder / "**" / "part-[0-9].*"], RECORDS)
    for name, (make_table, records) in PARQUET.items():
        for rows in (1, 4, 100):
            path = folder / f"{len(variants)}.parquet"
            pq.write_table(make_table(media), path, row_group_size=rows)
            needs_media = name == "plain columns"
            variants[f"parquet: {name}, {rows} rows in a group"] = Variant([path], records, needs_media)
    pq.write_table(paths_table(media), folder / "paths.parquet")
    variants["parquet: paths without bytes"] = Variant([folder / "paths.parquet"], RECORDS)
    return variants


@dataclass(frozen=True)
class Built:
    """The set with all variants: its manifest and samples, and the name of each variant's dataset."""

    variants: dict[str, Variant]
    datasets: dict[str, str]
    manifest: Manifest
    samples: dict[str, list[Packed]]


@pytest.fixture(scope="module")
def built(media: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("variants")
    (folder / "files").mkdir()
    (folder / "empty").mkdir()
    variants = write_variants(folder / "files", media)
    datasets = {name: f"d{index}" for index, name in enumerate(variants)}
    (folder / "datasets.toml").write_text(
        "".join(
            table(datasets[name], variant.files, media if variant.needs_media else folder / "empty")
            for name, variant in variants.items()
        )
    )
    manifest = build_datasets(",".join(datasets.values()), folder / "datasets.toml", tiny_checkpoint, folder / "out")
    return Built(variants, datasets, manifest, packed_samples(folder / "out"))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_format_and_spelling_gives_the_same_samples(built: Built, expected: dict[str, Packed], name: str) -> None:
    """Embedded media need no files: the datasets that have them have an empty media root."""
    assert set(VARIANTS) == set(built.variants)
    dataset, records = built.datasets[name], built.variants[name].records
    (statistics,) = (entry for entry in built.manifest.statistics if entry.dataset == dataset)
    assert statistics.num_annotations == statistics.num_packed == len(records)
    for index, record in enumerate(records):
        (sample,) = built.samples[f"{dataset}/{index}"]
        assert any(sample is other for other in built.samples[str(record["id"])]), "the id is kept"
        assert_same(sample, expected[str(record["id"])])


def test_images_without_a_tag_come_first(
    media: Path, tiny_checkpoint: Path, tmp_path: Path, expected: dict[str, Packed]
) -> None:
    """The Cauldron and FineVision write no tags; no setting is needed for such a set."""
    untagged = [{"id": "one", "images": ["a.png"], "conversations": ["What is this?", "A cat."]}]
    pq.write_table(texts_table(untagged, media), tmp_path / "a.parquet")
    build_file(tmp_path / "a.parquet", media, tiny_checkpoint, tmp_path / "out")
    assert_same(packed_samples(tmp_path / "out")["one"][0], expected["one"])


def test_a_share_above_100_takes_records_of_a_parquet_file_again(
    media: Path, tiny_checkpoint: Path, tmp_path: Path, expected: dict[str, Packed]
) -> None:
    """150 % of 9 annotations are 13 samples: each once, and four of them again, with the same media."""
    pq.write_table(messages_table(RECORDS, media), tmp_path / "a.parquet", row_group_size=4)
    manifest = build_file(tmp_path / "a.parquet", media, tiny_checkpoint, tmp_path / "out", share="%150")
    assert (manifest.counts.num_packed, manifest.counts.num_annotations) == (13, 13)
    packed = packed_samples(tmp_path / "out")
    copies = {str(record["id"]): packed[str(record["id"])] for record in RECORDS}
    assert sorted(map(len, copies.values())) == [1] * 5 + [2] * 4
    for name, samples in copies.items():
        for sample in samples:
            assert_same(sample, expected[name])


@pytest.mark.parametrize("share", ["%40", "%140"])
def test_a_share_draws_the_same_records_from_every_format(
    media: Path, tiny_checkpoint: Path, tmp_path: Path, share: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [canonical(record) for record in RECORDS])
    pq.write_table(messages_table(RECORDS, media), tmp_path / "a.parquet", row_group_size=4)
    drawn = []
    for name in ("a.jsonl", "a.parquet"):
        build_file(tmp_path / name, media, tiny_checkpoint, tmp_path / f"out-{name}", share=share)
        packed = packed_samples(tmp_path / f"out-{name}")
        drawn.append({key: len(samples) for key, samples in packed.items()})
    assert drawn[0] == drawn[1]


def test_another_max_length_does_not_read_the_media_of_a_parquet_file_again(
    media: Path, tiny_checkpoint: Path, tmp_path: Path, expected: dict[str, Packed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan stores embedded media."""
    path = tmp_path / "a.parquet"
    pq.write_table(messages_table(RECORDS, media), path)
    build_file(path, media, tiny_checkpoint, tmp_path / "out")

    def fail(*_: object) -> None:
        pytest.fail("rows were read again")

    monkeypatch.setattr(parquet_records, "read_chunk", fail)
    settings = BuildSettings(media=SETTINGS.media, max_length=400)
    manifest = build_file(path, media, tiny_checkpoint, tmp_path / "out", settings=settings)
    assert (manifest.settings.max_length, manifest.counts.num_packed) == (400, len(RECORDS))
    packed = packed_samples(tmp_path / "out")
    for name, sample in expected.items():
        assert_same(packed[name][0], sample)
