"""Which dataset every sample of a set of shards is of, from its ledgers.

Cost: three columns of each ledger; 4 bytes a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import storage
from schemas.errors import ShardError
from schemas.tables import SAMPLES_FILE, STATUS_PACKED
from storage.urls import Location
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


def read_ledger(folder: Location, columns: list[str], filters: list[tuple[str, str, object]]) -> pa.Table:
    """Rows and columns of the ledger of one set of shards.

    Args:
        folder: the set.
        columns: names.
        filters: rows, as pyarrow takes them.

    Raises:
        ShardError: it is missing or damaged.
    """
    path = folder / SAMPLES_FILE
    try:
        if isinstance(path, Path):
            return pq.read_table(path, columns=columns, filters=filters)
        with storage.open_file(path) as file:
            # Threads of pyarrow let go of a Python file some time after the call; where the interpreter ends just
            # then, it aborts (apache/arrow, issue 34314).
            return pq.read_table(file, columns=columns, filters=filters, use_threads=False, pre_buffer=False)
    except (FileNotFoundError, storage.NotThereError):
        raise ShardError(f"{path} is missing. Copy the folder again or build it again.") from None
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{path} cannot be read: {error}. Copy the folder again.") from error


def sample_datasets(index: ShardIndex) -> SampleDatasets:
    """Look up the datasets of all samples.

    Raises:
        ShardError: a ledger is missing, or does not know a bin.
    """
    names: dict[str, int] = {}
    parts: list[NDArray[np.int32]] = []
    for place, folder in enumerate(index.folders):
        first, end = index.first_bins[place : place + 2].tolist()
        ledger = read_ledger(folder, ["bin", "slot", "dataset"], [("status", "=", STATUS_PACKED)])
        ledger = ledger.sort_by([("bin", "ascending"), ("slot", "ascending")])
        expected = np.repeat(index.local_bin[first:end], index.num_samples[first:end])
        if not np.array_equal(ledger["bin"].to_numpy(), expected):
            raise ShardError(f"{folder / SAMPLES_FILE} does not have the samples of its bins. Build the shards again.")
        parts.append(np.array([names.setdefault(name, len(names)) for name in ledger["dataset"].to_pylist()], "i4"))
    return SampleDatasets(names=tuple(names), of_sample=np.concatenate(parts))
