"""Encode the corpus of LLaMA-Factory's dialects with LLaMA-Factory itself, into ``tests/data/peers_llama_factory.npz``.

Run by hand, in an environment of its own; no weights are read::

    pip install llamafactory==0.9.5
    python tests/peers/encode_llama_factory.py CHECKPOINT

CHECKPOINT is a folder with the tokenizer, the processor files and the ``config.json`` of Qwen2.5-VL; the one that
``python -m demo.tiny_model`` writes will do.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from files import (
    MAX_PIXELS,
    MAX_VIDEO_PIXELS,
    MIN_PIXELS,
    MIN_VIDEO_PIXELS,
    Encoding,
    read_corpus,
    write_encodings,
    write_images,
)

_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "tool_calls",
    "system_tag": "system",
}


def main(checkpoint: str) -> None:
    """Load each record as a data set of its own, as ``llamafactory-cli train`` does, and encode it for training."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.loader import get_dataset
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    corpus = read_corpus("llama_factory")
    encodings: dict[str, Encoding] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for index, record in enumerate(corpus.values()):
            write_images(record, Path(folder))
            Path(f"{index}.json").write_text(json.dumps([record]), encoding="utf-8")
        info = {str(index): _data_set(index, record) for index, record in enumerate(corpus.values())}
        Path("dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        model_args, data_args, training_args, _, _ = get_train_args(
            _arguments(checkpoint, folder, dataset=",".join(info))
        )
        loaded: dict[str, Any] = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
        for index, name in enumerate(corpus):
            data_args.dataset = [str(index)]
            data = get_dataset(template, model_args, data_args, training_args, stage="sft", **loaded)
            row = data["train_dataset"][0]
            images, videos = row["images"] or [], row["videos"] or []
            # As the collator calls it: images, videos, audios, how many of each, ids, processor.
            counts = ([len(images)], [len(videos)], [0])
            media = template.mm_plugin.get_mm_inputs(
                images, videos, [], *counts, [row["input_ids"]], loaded["processor"]
            )
            grids = [media[key].numpy() for key in ("image_grid_thw", "video_grid_thw") if key in media]
            encodings[name] = Encoding(
                np.array(row["input_ids"], dtype=np.int32),
                np.array(row["labels"], dtype=np.int32),
                np.concatenate([np.zeros((0, 3), np.int32), *grids]).astype(np.int32),
            )
    packages = ("llamafactory", "transformers", "torch", "pillow")
    write_encodings("llama_factory", encodings, [f"{package} {version(package)}" for package in packages])


def _data_set(index: int, record: dict[str, Any]) -> dict[str, Any]:
    """The entry of ``dataset_info.json`` for a record, as its documentation describes each dialect."""
    columns = {key: key for key in ("system", "tools", "images", "videos", "history") if key in record}
    entry: dict[str, Any] = {"file_name": f"{index}.json", "columns": columns}
    if "instruction" in record:
        columns.update(prompt="instruction", query="input", response="output")
        return {**entry, "formatting": "alpaca"}
    if "conversations" in record:
        columns["messages"] = "conversations"
        return {**entry, "formatting": "sharegpt"}
    columns["messages"] = "messages"
    has_calls = any("tool_calls" in message for message in record["messages"])
    return {**entry, "formatting": "openai" if has_calls else "sharegpt", "tags": _OPENAI_TAGS}


def _arguments(checkpoint: str, folder: str, dataset: str) -> dict[str, Any]:
    return {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": checkpoint,
        "template": "qwen2_vl",
        "dataset": dataset,
        "dataset_dir": folder,
        "media_dir": folder,
        "cutoff_len": 1 << 20,
        "overwrite_cache": True,
        "image_min_pixels": MIN_PIXELS,
        "image_max_pixels": MAX_PIXELS,
        "video_min_pixels": MIN_VIDEO_PIXELS,
        "video_max_pixels": MAX_VIDEO_PIXELS,
        "output_dir": "out",
        "report_to": "none",
    }


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
