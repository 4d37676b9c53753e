"""Reads and checks the bins of an index: number of a bin -> arrays.

Input: one positional read, one range request, or one read of the local cache. Checked are the XXH3-64 of the bytes, the
structure of the bin, its counts against the index, and what training relies on (:func:`storage.bins.check_samples`).
Every failure names shard, bin and offset.

Cost: one read into a reused buffer, with XXH3 computed while the bytes are in the processor's cache. The arrays are
views of the buffer.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from schemas.bins import Bin
from schemas.errors import ConfigError, ShardError
from storage.bins import BinLocation, check_digest, check_samples, parse_bin, read_into_buffer
from storage.pixels import require_pillow
from storage.request import DEFAULT_POLICY, RetryPolicy
from storage.urls import Url
from train.shards.buffers import Buffers, ReusedBuffers
from train.shards.cache import BinCache, cache_key
from train.shards.index import ShardIndex

logger = logging.getLogger(__name__)

VERIFY = ("always", "first", "never")
"""When a reader compares checksums: with every read, with its first read of each bin, or not at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSettings:
    """How bins are read.

    Attributes:
        verify: when checksums are compared, one of ``VERIFY``. Structure and counts of a bin are always checked.
        connections: range requests of a rank in flight at once.
        retry_policy: of remote shards.
        cache_dir: folder on a local disk that caches bins of remote shards; None for no cache.
        cache_bytes: capacity of the cache.
    """

    verify: str = "always"
    connections: int = 16
    retry_policy: RetryPolicy = DEFAULT_POLICY
    cache_dir: Path | None = None
    cache_bytes: int = 100 << 30

    def __post_init__(self) -> None:
        if self.verify not in VERIFY:
            raise ConfigError(f"verify is {self.verify}; allowed: {', '.join(VERIFY)}.")
        if self.connections < 1:
            raise ConfigError(f"connections is {self.connections}; allowed: 1 or more.")
        if self.cache_bytes < 1:
            raise ConfigError(f"cache_bytes is {self.cache_bytes}; allowed: 1 or more.")


class LoadedBin(NamedTuple):
    """A bin, its location, and the buffer that its arrays are views of."""

    bin: Bin
    location: BinLocation
    buffer: torch.Tensor


class BinReader:
    """Reads the bins of an index. Threads may share a reader."""

    def __init__(self, index: ShardIndex, settings: ReadSettings | None = None, buffers: Buffers | None = None) -> None:
        """Create a reader. Nothing is read yet.

        Args:
            index: the bins.
            settings: how they are read.
            buffers: where bins are read to; reused ordinary memory by default.

        Raises:
            ConfigError: a cache for shards that all lie on a file system, where it would never be used; shards with
                JPEG pixels without Pillow to decode them.
        """
        self._index = index
        self._settings = settings or ReadSettings()
        self._buffers = buffers or ReusedBuffers()
        self._stop_event = threading.Event()
        if any(manifest.settings.pixels == "jpeg" for manifest in index.manifests):
            require_pillow()
        self._cache: BinCache | None = None
        if self._settings.cache_dir is not None:
            if not self.is_remote:
                raise ConfigError(
                    f"the cache {self._settings.cache_dir} has no effect: all shards lie on a file system. "
                    "Leave it out, or give the URL of the shards."
                )
            self._cache = BinCache(self._settings.cache_dir, self._settings.cache_bytes)
        self._shard_sha256 = [shard.sha256 for manifest in index.manifests for shard in manifest.shards]
        # (B,) each: bins whose checksum was compared, and bins whose bytes with that checksum passed all checks
        self._verified, self._passed = np.zeros((2, index.num_bins), dtype=np.bool_)

    @property
    def is_remote(self) -> bool:
        """Whether a folder lies behind a URL."""
        return self._index.is_remote

    def read(self, bin_id: int) -> LoadedBin:
        """Read a bin of the index.

        Returns:
            The bin, with its number in its own folder; the arrays are writable views of one buffer.

        Raises:
            ShardError: the shard is missing, short or unreadable, its bytes have another checksum, or they are not the
                bin that the index describes.
        """
        location = self._index.locate(bin_id)
        buffer = self._buffers.take(location.num_bytes)
        data = buffer.numpy().data
        cache = self._cache if isinstance(location.path, Url) else None
        bin_ = None if cache is None else self._read_cached(cache, bin_id, location, data)
        if bin_ is None:
            # With any settings, only checked bins enter the cache: damage must not be kept.
            verify = cache is not None or self._is_checked(bin_id)
            self._fetch(bin_id, location, data, verify=verify)
            bin_ = self._parse(bin_id, location, data, is_verified=verify)
            if cache is not None:
                cache.write(self._key(bin_id), data)
        return LoadedBin(bin_, location, buffer)

    def close(self) -> None:
        """Make reads that wait for a retry fail at once."""
        self._stop_event.set()

    def _fetch(self, bin_id: int, location: BinLocation, data: memoryview, *, verify: bool) -> None:
        """Read a bin from its shard."""
        read_into_buffer(location, data, verify=verify, policy=self._settings.retry_policy, stop_event=self._stop_event)
        if verify:
            self._verified[bin_id] = True

    def _read_cached(self, cache: BinCache, bin_id: int, location: BinLocation, data: memoryview) -> Bin | None:
        """The bin from the cache; None if it is missing or damaged there."""
        if not cache.read(self._key(bin_id), data):
            return None
        try:
            verify = self._is_checked(bin_id)
            if verify:
                check_digest(location, xxhash.xxh3_64_intdigest(data))
                self._verified[bin_id] = True
            return self._parse(bin_id, location, data, is_verified=verify)
        except ShardError:
            logger.warning("%s: its copy in the cache is damaged; reading it from the shard again", location)
            cache.remove(self._key(bin_id))
            return None

    def _parse(self, bin_id: int, location: BinLocation, data: memoryview, *, is_verified: bool) -> Bin:
        """Parse a bin, and check its contents and its counts against the index.

        Bytes that have the checksum of bytes which passed are the same bytes: their contents are not checked again.
        """
        bin_ = parse_bin(data, location.local_bin, where=location)
        if not (is_verified and self._passed[bin_id]):
            check_samples(bin_, where=location, expected=self._index.counts(bin_id))
            if is_verified:
                self._passed[bin_id] = True
        return bin_

    def _key(self, bin_id: int) -> str:
        index = self._index
        sha256 = self._shard_sha256[index.shard[bin_id]]
        return cache_key(sha256, int(index.offset[bin_id]), int(index.num_bytes[bin_id]))

    def _is_checked(self, bin_id: int) -> bool:
        """Whether this read compares the checksum."""
        verify = self._settings.verify
        return verify == "always" or (verify == "first" and not self._verified[bin_id])


def read_checked_bin(index: ShardIndex, bin_id: int) -> Bin:
    """Read one bin, its checksum included; see :meth:`BinReader.read`."""
    return BinReader(index).read(bin_id).bin
