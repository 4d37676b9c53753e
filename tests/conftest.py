"""What tests share: tiny checkpoints, and the folder of real media where it is there."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[1]

# No test needs a hub; asking one would only wait for a network that may not be there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell starts its background jobs deaf to Ctrl-C, nohup its own to SIGHUP; so would be programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; set before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


NOT_OF_A_UNIT = {"demo_checkpoint", "finished", "qwen_demo", "ray_cluster"}
"""Fixtures of tests that build shards, train, or run the commands: a whole checkpoint, a finished set, real media."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow by its fixtures, and start with the files that have most of it.

    The last files are short then, so all workers end together.
    """
    for item in items:
        if isinstance(item, pytest.Function) and not NOT_OF_A_UNIT.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])


def _checkpoint(tmp_path_factory: pytest.TempPathFactory, name: str, vocab_size: int | None) -> Path:
    """Write a tiny checkpoint once a test run, also when several workers ask for it at the same time."""
    from demo.tiny_model import write_tiny_checkpoint

    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = root / name
    with FileLock(root / f"{name}.lock"):
        if not (out / "preprocessor_config.json").exists():
            write_tiny_checkpoint(out, vocab_size=vocab_size)
    return out


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2.5-VL checkpoint of the demo with the real tokenizer. Read-only: tests share it."""
    return _checkpoint(tmp_path_factory, "tiny-checkpoint", None)


@pytest.fixture(scope="session")
def tiny_checkpoint(demo_checkpoint: Path) -> Path:
    """The same; tests of the trainer have a smaller one. Read-only: tests share it."""
    return demo_checkpoint


@pytest.fixture(scope="session")
def tiny_vocab_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a vocabulary of 2048 and no tokenizer, much faster. Read-only: tests share it."""
    return _checkpoint(tmp_path_factory, "tiny-vocab-checkpoint", 2048)


@pytest.fixture(scope="session")
def qwen_demo() -> Path:
    """Real images and videos with annotations (one video is missing on purpose), which lie beside the repository."""
    path = REPOSITORY.parent / "shared" / "data" / "qwen_demo"
    if not path.is_dir():
        pytest.skip("the folder of real media, ../shared/data/qwen_demo, is not here")
    return path
