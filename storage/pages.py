"""The sizes of the pages of a Parquet column, from their headers, before anything is decompressed.

The footer of a file says how large a column is, but readers allocate what the header of each page says: a page of 60 kB
can stand for 2 GB. In: a file, and what its footer says of a column. Out: bytes of its pages once decompressed.

A header is a ``PageHeader`` in the compact protocol of Thrift (github.com/apache/parquet-format,
github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md). Cost: 20 us a page, of 1 MiB as a rule.
"""

from __future__ import annotations

from typing import Any, BinaryIO

_HEADER_BYTES = 1 << 15
"""Most bytes of a header. They hold the smallest and largest value of the page, which writers cut at 4 KiB."""

_MAX_DEPTH, _MAX_BITS = 4, 64
_UNCOMPRESSED, _COMPRESSED = 2, 3
"""Numbers of the fields of a header."""

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 12


def uncompressed_bytes(file: BinaryIO, column: Any) -> int:
    """Bytes of all pages of a column of a row group once they are decompressed.

    Args:
        file: the Parquet file.
        column: its ``pyarrow.parquet.ColumnChunkMetaData``.

    Raises:
        ValueError: a header is damaged.
    """
    if not column.num_values:
        return 0
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < at:
        at = column.dictionary_page_offset
    end = at + column.total_compressed_size
    total = 0
    while at < end:
        file.seek(at)
        fields, length = _read_struct(file.read(_HEADER_BYTES), 0, 0)
        uncompressed, compressed = fields.get(_UNCOMPRESSED, -1), fields.get(_COMPRESSED, -1)
        if uncompressed < 0 or compressed < 0:
            raise ValueError(f"the page at byte {at} has no size")
        total += uncompressed
        at += length + compressed
    return total


def _read_struct(data: bytes, at: int, depth: int) -> tuple[dict[int, int], int]:
    """The integers of a struct by the numbers of their fields, and where it ends."""
    fields: dict[int, int] = {}
    number = 0
    try:
        while data[at]:
            delta, kind = data[at] >> 4, data[at] & 15
            at += 1
            if delta:
                number += delta
            else:
                number, at = _read_integer(data, at)
            if kind in (_I16, _I32, _I64):
                fields[number], at = _read_integer(data, at)
            elif kind == _BINARY:
                length, at = _read_varint(data, at)
                at += length
            elif kind == _STRUCT and depth < _MAX_DEPTH:
                at = _read_struct(data, at, depth + 1)[1]
            elif kind in (_TRUE, _FALSE, _BYTE, _DOUBLE):
                at += {_BYTE: 1, _DOUBLE: 8}.get(kind, 0)
            else:
                raise ValueError(f"a field of type {kind} in the header of a page")
    except IndexError:
        raise ValueError(f"no end of the header of a page within {len(data)} bytes") from None
    return fields, at + 1


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    """A signed integer in zigzag encoding, and where it ends."""
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < _MAX_BITS:
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
        shift += 7
    raise ValueError("an integer of more than 64 bits in the header of a page")
