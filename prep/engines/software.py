"""The packages whose version can change the bytes of a build, as the manifest names them; what else workers must share.

Pillow-SIMD takes Pillow's place (the same import name, another distribution) and resizes with other rounding, so the
two must not be taken for each other.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import PIL

from schemas.errors import ConfigError

_PACKAGES = ("decord2", "numpy", "pyarrow", "tokenizers", "zstandard")
_PILLOWS = ("pillow-simd", "pillow")
_OTHERS = ("vlprep", "av", "torchcodec", "msgspec", "xxhash")


def software_versions() -> dict[str, str]:
    """Versions by the name of the distribution, Pillow's or its stand-in's first.

    Raises:
        ConfigError: one is missing, or it cannot be told which Pillow is imported.
    """
    found = {name: installed for name in (*_PILLOWS, *_PACKAGES) if (installed := _version(name)) is not None}
    serving = [name for name in _PILLOWS if found.get(name) == PIL.__version__]
    if len(serving) != 1:
        raise ConfigError(
            f"the Pillow that is imported has version {PIL.__version__}, but installed are "
            f"{_listed({name: found[name] for name in _PILLOWS if name in found})}. Uninstall both and install one: "
            "pip uninstall pillow pillow-simd; pip install --force-reinstall pillow"
        )
    missing = [name for name in _PACKAGES if name not in found]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be installed: pip install {' '.join(missing)}")
    return {name: found[name] for name in (*serving, *_PACKAGES)}


def environment() -> dict[str, str]:
    """:func:`software_versions`, and what else must be the same wherever tasks of one build run: Python's version up to
    the minor one, vlprep, and the packages that tasks and results pass through. A package that is not installed is
    left out.
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
