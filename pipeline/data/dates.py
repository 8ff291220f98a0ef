"""The date that chat templates print as today's, fixed for all rows and for each preparation of the data."""

from __future__ import annotations

from datetime import date, datetime, time
from functools import cache
from string import ascii_letters

__all__ = ["dated", "prints_date"]

NOW = "strftime_now"
"""Function that transformers passes to chat templates. It can't be replaced, so a macro of that name shadows it."""
DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in ascii_letters]
RARE = [f"%{flag}{letter}" for flag in "_^#0EO" for letter in ascii_letters]
"""Directives of strftime that this system supports; rare ones are replaced only where the template's text has them. The time of
day is midnight."""


def prints_date(template: str | dict[str, str] | None) -> bool:
    """Return whether a chat template, or any of a tokenizer's several, prints the date."""
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(NOW in text for text in texts)


@cache
def dated(template: str, day: date) -> str:
    """Return the template with a macro that prints `day` as the current date."""
    # A macro's `format` is known only at rendering, so every directive is replaced by its value within the template.
    start = datetime.combine(day, time())
    directives = [*(directive for directive in RARE if directive in template), *DIRECTIVES]
    # `%%` is hidden first and restored last, so that the letter after it isn't read as a directive.
    values = [("%%", "\ue002"), *((directive, start.strftime(directive)) for directive in directives), ("\ue002", "%")]
    filters = "".join(f"|replace({old!r}, {new!r})" for old, new in values if old != new)
    # The line break isn't rendered; with it, blanks before the template's first block are still stripped as at a line start.
    return f"{{%- macro {NOW}(format) -%}}{{{{ format{filters} }}}}{{%- endmacro %}}\n{template}"
