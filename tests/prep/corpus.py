"""A small corpus with every kind of medium and some broken records, for tests of the build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.prep.test_videos import write_video


def turn(question: str, answer: str = "An answer.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_corpus(folder: Path, num_good: int = 24) -> tuple[Path, dict[str, str]]:
    """Write ``annotations.jsonl`` with media; return it and the expected code of every broken record by id."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(6):
        size = tuple(rng.integers(30, 200, 2).tolist())
        colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    (folder / "cut.jpg").write_bytes(b"")
    Image.fromarray(rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:1500])
    write_video(folder / "clip.mp4", 12, 2)
    good: list[dict[str, Any]] = []
    for index in range(num_good):
        name = f"{index % 6}.png"
        kinds: list[dict[str, Any]] = [
            {"image": name, "conversations": turn("<image>\nWhat is this?")},
            {"conversations": turn("Say something. " * (1 + index % 5))},
            {"images": [name, "0.png"], "conversations": turn("First <image>, then <image>: same?")},
            {
                "video": "clip.mp4",
                "conversations": turn("<video>What happens?", "It gets brighter. " * (1 + index % 3)),
            },
        ]
        good.append({"id": f"good-{index}", **kinds[index % len(kinds)]})
    bad: list[tuple[str, dict[str, Any]]] = [
        ("media_missing", {"image": "none.png", "conversations": turn("<image>")}),
        (
            "media_unreadable",
            {"image": "cut.jpg", "conversations": turn("<image> is cut short: only decoding finds out")},
        ),
        ("tag_mismatch", {"image": "0.png", "conversations": turn("no tag")}),
        ("too_long", {"conversations": turn("long " * 3000)}),
    ]
    records = [json.dumps(record) for record in good]
    records += [json.dumps({"id": f"bad-{code}", **record}) for code, record in bad]
    (folder / "annotations.jsonl").write_text("\n".join(records[::-1]) + "\n{not json\n")
    return folder / "annotations.jsonl", {f"bad-{code}": code for code, _ in bad}
