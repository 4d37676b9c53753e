"""Limits on rejects: a build stops when too many annotations cannot be packed.

Input: counts of the scan or of the ledger. Output: nothing, or an error that counts the rejects by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from prep.build.columns import SampleColumns, count_rejects
from prep.build.parts import ScannedPart
from schemas.annotation import ReasonCode
from schemas.errors import VlprepError
from schemas.wording import counted

_HELP = "`vlprep validate` on the annotation file or dataset says what is wrong with each record."
_HELP_TOO_LONG = f"{_HELP[:-1]}; too_long depends on --max-length, --overlong and the media settings."


def check_scan(
    parts: Sequence[ScannedPart], samples: SampleColumns, *, max_length: int, max_rejected: Fraction
) -> None:
    """Stop before the write step if the scan alone shows that too little can be packed.

    Raises:
        VlprepError: nothing can be packed, or too many annotations are rejected.
    """
    if not samples.num_drawn:
        raise VlprepError(
            "there is no annotation to pack: the annotation files are empty, or the share taken of them (%N, "
            "sampling_rate) is less than one annotation. No set was written; take a larger share."
        )
    num_packable = int((samples.num_tokens <= max_length).sum())
    num_rejected = samples.num_drawn - num_packable
    if num_packable and num_rejected <= max_rejected * samples.num_drawn:
        return
    codes = count_rejects(parts) + Counter({ReasonCode.TOO_LONG.value: samples.num_tokens.size - num_packable})
    if not num_packable:
        raise VlprepError(
            f"none of {counted(samples.num_drawn, 'annotation')} can be packed{_by_code(codes)}. No set was written. "
            f"{_help(codes)}"
        )
    check_share(num_rejected, samples.num_drawn, codes, max_rejected=max_rejected)


def check_share(num_rejected: int, num_drawn: int, codes: Counter[str], *, max_rejected: Fraction) -> None:
    """Stop if too large a share of the drawn annotations is rejected.

    Args:
        num_rejected: rejected annotations.
        num_drawn: drawn annotations.
        codes: rejects by reason code.
        max_rejected: largest share that is accepted.

    Raises:
        VlprepError: the share is larger.
    """
    if num_rejected > max_rejected * num_drawn:
        raise VlprepError(
            f"{num_rejected} of {num_drawn} annotations are rejected, more than --max-rejected "
            f"{float(max_rejected):.2%}{_by_code(codes)}. No set was written. {_help(codes)} With a higher "
            "--max-rejected, samples.parquet lists every reject."
        )


def _help(codes: Counter[str]) -> str:
    return _HELP_TOO_LONG if codes[ReasonCode.TOO_LONG.value] else _HELP


def _by_code(codes: Counter[str]) -> str:
    return f" ({', '.join(f'{code} {count}' for code, count in codes.most_common() if count)})"
