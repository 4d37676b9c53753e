"""The dataset of every sample of a set of shards, from its ledgers.

Cost: reading three columns of each ledger; 4 bytes per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ShardError
from schemas.tables import SAMPLES_FILE
from storage.shard_set import read_packed
from train.shards.index import ShardIndex


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleDatasets:
    """Datasets of the samples.

    Attributes:
        names: the datasets.
        of_sample: (N,) int32, position in ``names`` for every sample, in the order of bins and slots.
    """

    names: tuple[str, ...]
    of_sample: NDArray[np.int32]


def sample_datasets(index: ShardIndex) -> SampleDatasets:
    """Look up the datasets of all samples.

    Raises:
        ShardError: a ledger is missing, or does not know a bin.
    """
    names: dict[str, int] = {}
    parts: list[NDArray[np.int32]] = []
    for position, folder in enumerate(index.folders):
        first, end = index.first_bins[position : position + 2].tolist()
        ledger = read_packed(folder, names=["bin", "slot", "dataset"])
        ledger = ledger.sort_by([("bin", "ascending"), ("slot", "ascending")])
        expected = np.repeat(index.local_bin[first:end], index.num_samples[first:end])
        if not np.array_equal(ledger["bin"].to_numpy(), expected):
            raise ShardError(f"{folder / SAMPLES_FILE} does not have the samples of its bins. Build the shards again.")
        parts.append(np.array([names.setdefault(name, len(names)) for name in ledger["dataset"].to_pylist()], "i4"))
    return SampleDatasets(names=tuple(names), of_sample=np.concatenate(parts))
