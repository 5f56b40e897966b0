"""Text for people: tables."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in GitHub's Markdown, its columns padded so that it reads well in a terminal, too.

    Cells are printed as they are (numbers by `str`); what would end a cell or a line in them is escaped.
    """
    def cell(value: Any) -> str:
        return ' '.join(str(value).split()).replace('|', '\\|')

    return tabulate(
        [[cell(value) for value in row] for row in rows], [cell(header) for header in headers], tablefmt='github',
        disable_numparse=True)
