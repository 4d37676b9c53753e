"""Fixtures of the preparation tests: one finished set of shards with every kind of medium, and its sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prep.corpus import write_corpus
from tests.prep.finished import build_set
from tests.prep.ray_cluster import NodeProcesses, node_processes


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations with images, videos, texts and broken records. Read-only: tests share it."""
    return write_corpus(tmp_path_factory.mktemp("finished-corpus"))[0]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tiny_checkpoint: Path) -> Path:
    """A finished set of several shards with several bins. Read-only: tests copy it to change it."""
    return build_set(corpus_file, tmp_path_factory.mktemp("finished"), tiny_checkpoint)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[NodeProcesses]:
    """A Ray cluster of a head that does no work and a node with two CPUs. Tests add nodes, and remove them."""
    with node_processes() as nodes:
        nodes.add(2)
        yield nodes
