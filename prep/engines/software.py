"""Versions of the packages that can change the bytes of a build, and of those that workers must share.

Pillow-SIMD has the import name of Pillow and resizes with different rounding, so the two must be told apart.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import PIL

from schemas.errors import ConfigError

_PACKAGES = ("av", "numpy", "pyarrow", "tokenizers", "zstandard")
_PILLOWS = ("pillow-simd", "pillow")
_OTHERS = ("vlprep", "decord2", "torchcodec", "msgspec", "xxhash")


def software_versions() -> dict[str, str]:
    """Versions by distribution name, that of Pillow or Pillow-SIMD first.

    Raises:
        ConfigError: a package is missing, or it is unclear which Pillow is imported.
    """
    versions = {name: version for name in (*_PILLOWS, *_PACKAGES) if (version := _version(name)) is not None}
    imported = [name for name in _PILLOWS if versions.get(name) == PIL.__version__]
    if len(imported) != 1:
        installed = _listed({name: versions[name] for name in _PILLOWS if name in versions})
        raise ConfigError(
            f"the imported Pillow has version {PIL.__version__}, but the installed packages are {installed}. Uninstall "
            "both and install one: "
            "pip uninstall pillow pillow-simd; pip install --force-reinstall pillow"
        )
    missing = [name for name in _PACKAGES if name not in versions]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be installed: pip install {' '.join(missing)}")
    return {name: versions[name] for name in (*imported, *_PACKAGES)}


def environment() -> dict[str, str]:
    """Versions that must agree on all machines of a build: those of :func:`software_versions`, Python (major and
    minor), vlprep, and the packages that serialise tasks and results. Packages that are not installed are left out.
    """
    others = {name: installed for name in _OTHERS if (installed := _version(name)) is not None}
    return {"Python": ".".join(platform.python_version_tuple()[:2]), **others, **software_versions()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {installed}" for name, installed in versions.items()) or "neither pillow nor pillow-simd"
