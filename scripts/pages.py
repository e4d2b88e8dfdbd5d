"""Markdown that scripts write: prose in lines that fit a terminal and a diff."""

import re
import textwrap

WIDTH = 116


def page(lines: list[str]) -> str:
    """The text of a page: prose is wrapped at WIDTH; tables, code and headings are left alone."""
    found = []
    for line in "\n".join(lines).split("\n"):
        if len(line) <= WIDTH or line.startswith(("|", "    ", "#", "!", "<", "```")):
            found.append(line)
        else:
            indent = " " * (match.end() if (match := re.match(r"(-|\d+\.) ", line)) else 0)
            found += textwrap.wrap(
                line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
    return "\n".join(found)
