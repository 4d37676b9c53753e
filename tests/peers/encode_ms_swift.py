"""Encode the corpus of ms-swift's dialect with ms-swift itself, into ``tests/data/peers_ms_swift.npz``.

Run by hand, in an environment of its own; no weights are read::

    pip install ms-swift==4.6.0 qwen-vl-utils==0.0.14 torchvision
    python tests/peers/encode_ms_swift.py CHECKPOINT

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

# qwen_vl_utils, which loads the media, reads these when it is imported: bounds in tokens.
os.environ["IMAGE_MIN_TOKEN_NUM"] = str(MIN_PIXELS // 28**2)
os.environ["IMAGE_MAX_TOKEN_NUM"] = str(MAX_PIXELS // 28**2)
os.environ["VIDEO_MIN_TOKEN_NUM"] = str(MIN_VIDEO_PIXELS // 28**2)
os.environ["VIDEO_MAX_TOKEN_NUM"] = str(MAX_VIDEO_PIXELS // 28**2)


def main(checkpoint: str) -> None:
    """Load each record as a data set of its own, as ``swift sft --dataset FILE`` does, and encode it for training."""
    import torch
    from swift.dataset import load_dataset
    from swift.model import get_processor
    from swift.template import get_template

    processor = get_processor(checkpoint, model_type="qwen2_5_vl")
    template = get_template(processor, template_type="qwen2_5_vl", agent_template="hermes", max_length=1 << 20)
    template.set_mode("train")
    encodings: dict[str, Encoding] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for index, (name, record) in enumerate(read_corpus("ms_swift").items()):
            write_images(record, Path(folder))
            path = Path(f"{index}.jsonl")
            path.write_text(json.dumps(record) + "\n", encoding="utf-8")
            dataset, _ = load_dataset(str(path), strict=True, load_from_cache_file=False)
            template.bbox_format = "legacy" if name == "boxes as tokens" else "new"
            encoded: dict[str, Any] = template.encode(dataset[0])
            grids = [encoded[key] for key in ("image_grid_thw", "video_grid_thw") if encoded.get(key) is not None]
            encodings[name] = Encoding(
                np.array(encoded["input_ids"], dtype=np.int32),
                np.array(encoded["labels"], dtype=np.int32),
                torch.cat(grids).numpy().astype(np.int32) if grids else np.zeros((0, 3), np.int32),
            )
    packages = ("ms-swift", "transformers", "qwen-vl-utils", "torch", "pillow")
    write_encodings("ms_swift", encodings, [f"{package} {version(package)}" for package in packages])


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
