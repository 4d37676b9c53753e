"""Renders the templates of the report. Everything that is filled in is escaped, unless a template says otherwise.

Input: the name of a template and its variables. Output: HTML. The style sheet and the script are constant texts of the
package, so that the page's content security policy can name their hashes and forbid all others.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from schemas.wording import counted, printable

_PACKAGE = "prep.inspect.report"
_FOLDER = "templates"


def render(name: str, variables: Mapping[str, object]) -> str:
    """Render a template of the package."""
    style, script = _text("style.css"), _text("script.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    # Neither has text of others, and an escaped style sheet would not work.
    constants = {"style": Markup(style), "script": Markup(script), "policy": policy}
    return _environment().get_template(name).render({**constants, **variables})


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(_PACKAGE, _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(printable=printable, percent=percent, thousands=lambda count: f"{count:,}")
    environment.globals.update(counted=counted)
    return environment


def percent(share: float) -> str:
    """A share from 0 to 1 in percent."""
    return f"{share * 100:.2f} %" if 0 < share < 1 else f"{share * 100:.0f} %"


def _text(name: str) -> str:
    return (files(_PACKAGE) / _FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source expression of the Content Security Policy, level 2, section 4.2.5."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
