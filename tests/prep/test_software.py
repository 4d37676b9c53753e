"""The manifest names the packages that decide the bytes: Pillow, or what was installed in its place."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import PIL
import pytest

from prep.engines.software import environment, software_versions
from schemas.errors import ConfigError

SIMD = "12.1.1.post0"


@pytest.fixture
def simd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of Pillow-SIMD, as pip leaves it, beside those of Pillow."""
    folder = tmp_path / f"pillow_simd-{SIMD}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pillow-simd\nVersion: {SIMD}\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_pillow_is_named_with_the_version_that_is_imported() -> None:
    versions = software_versions()
    assert versions["pillow"] == PIL.__version__ == version("pillow")
    assert list(versions) == ["pillow", "av", "numpy", "pyarrow", "tokenizers", "zstandard"]


def test_pillow_simd_is_recorded_in_place_of_pillow(simd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL, "__version__", SIMD)
    versions = software_versions()
    assert versions["pillow-simd"] == SIMD
    assert "pillow" not in versions
    assert environment()["pillow-simd"] == SIMD


def test_leftover_metadata_do_not_count(simd: None) -> None:
    assert "pillow" in software_versions()
    assert "pillow-simd" not in software_versions()


def test_a_pillow_of_no_installed_package_is_an_error(simd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL, "__version__", "1.0")
    with pytest.raises(
        ConfigError,
        match=rf"imported Pillow has version 1\.0, but the installed packages are pillow-simd {SIMD}, pillow",
    ):
        software_versions()
