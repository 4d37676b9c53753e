"""Declared settings: bounds, choices, units and defaults come from the field, in checks and in help texts alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigError
from schemas.setting import MAX_INT, Setting, check_settings, setting_fields
from schemas.settings import BuildSettings, MediaSettings


@dataclass(frozen=True, kw_only=True)
class Example:
    """Every kind of declaration."""

    folder: Annotated[Path, Setting("A folder.")]
    count: Annotated[int, Setting("A count.", unit="bins", low=1)] = 2
    share: Annotated[float | None, Setting("A share.", low=0, below=1, unset="half")] = None
    epochs: Annotated[float, Setting("Epochs.", above=0, high=10)] = 1.0
    mode: Annotated[str, Setting("A mode.", choices=("fast", "exact"))] = "fast"
    size: Annotated[int | msgspec.UnsetType, Setting("A size.", unit="bytes", unset="automatic")] = msgspec.UNSET
    internal: int = 3


def test_fields_have_the_kind_default_and_help_of_their_declaration() -> None:
    fields = setting_fields(Example)
    assert {name: field.kind for name, field in fields.items()} == {
        "folder": Path,
        "count": int,
        "share": float,
        "epochs": float,
        "mode": str,
        "size": int,
    }
    assert [name for name, field in fields.items() if field.is_required] == ["folder"]
    assert {name: field.help_text() for name, field in fields.items()} == {
        "folder": "A folder.  [required]",
        "count": "A count.  [1 or more bins; default: 2]",
        "share": "A share.  [0 to below 1; default: half]",
        "epochs": "Epochs.  [more than 0, up to 10; default: 1.0]",
        "mode": "A mode.  [default: fast]",
        "size": "A size.  [bytes; default: automatic]",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "--count is 0; allowed: 1 or more bins. Fix it."),
        ({"count": MAX_INT + 1}, f"--count is {MAX_INT + 1}; allowed: up to {MAX_INT}. Fix it."),
        ({"share": 1.0}, "--share is 1.0; allowed: 0 to below 1. Fix it."),
        ({"share": float("nan")}, "--share is nan; allowed: 0 to below 1. Fix it."),
        ({"epochs": 0}, "--epochs is 0; allowed: more than 0, up to 10. Fix it."),
        ({"epochs": float("inf")}, "--epochs is inf; allowed: more than 0, up to 10. Fix it."),
        ({"mode": "slow"}, "--mode is slow; allowed: fast, exact. Fix it."),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_what_is_allowed(change: dict[str, object], message: str) -> None:
    example = Example(folder=Path("x"), **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check_settings(example, spell="--{}".format, fix=" Fix it.")
    assert str(caught.value) == message


@given(st.integers(1, MAX_INT), st.floats(0, 1, exclude_max=True) | st.none(), st.floats(1e-300, 10))
def test_every_value_within_the_bounds_is_accepted(count: int, share: float | None, epochs: float) -> None:
    check_settings(
        Example(folder=Path("x"), count=count, share=share, epochs=epochs), spell="--{}".format, fix=" Fix it."
    )


@pytest.mark.parametrize("settings_class", [BuildSettings, MediaSettings])
def test_every_setting_of_a_build_is_declared_and_its_default_is_allowed(settings_class: type) -> None:
    fields = setting_fields(settings_class)
    assert set(fields) == {field.name for field in msgspec.structs.fields(settings_class)} - {"media"}
    assert all(field.setting.help.endswith(".") for field in fields.values())
    settings_class()


def test_the_settings_in_a_manifest_keep_their_bytes() -> None:
    """Fingerprints of builds hash these bytes: a change would redo every build."""
    assert msgspec.json.encode(BuildSettings(pixels="jpeg")) == (
        b'{"media":{"min_pixels":12544,"max_pixels":451584,"video_min_frame_pixels":200704,'
        b'"video_max_frame_pixels":1304576,"video_min_frames":4,"video_max_frames":8,"base_interval":4.0,'
        b'"video_sampling":"interval","fps":2.0,"fps_min_frames":4,"fps_max_frames":768,"video_total_pixels":null,'
        b'"max_source_pixels":178956970,"max_source_bytes":4294967296,"decode_timeout":60.0},"max_length":4096,'
        b'"max_patches":null,"packer":"bfd","pixels":"jpeg","jpeg_quality":95,"reserved":"reject",'
        b'"overlong":"reject","seed":0,"shard_bytes":536870912}'
    )
    assert b"jpeg_quality" not in msgspec.json.encode(BuildSettings())
