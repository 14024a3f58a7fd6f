"""Tables of results: as text for a terminal, as HTML for a notebook."""

import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

# Rows that a notebook or a prompt shows of a long table.
NUM_SHOWN = 20
# What a terminal obeys, or what changes the order in which text is read; lines and tabs are not among it.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Write control characters as `\u001b`: strings of models and corpora must not steer a terminal.

    A JSON document stays one, and says the same.
    """
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Table(NamedTuple):
    """A table and the line above it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[object]]


class Shown:
    """A result that prompts and notebooks show as a table."""

    def _table(self) -> Table:
        """Return what is shown; rows beyond the first `NUM_SHOWN` are counted only."""
        raise NotImplementedError

    def __repr__(self) -> str:
        table, more = _shortened(self._table())
        return "\n".join([table.title, format_table(table.rows, table.headers), *([more] if more else [])])

    def _repr_html_(self) -> str:
        table, more = _shortened(self._table())
        head = "".join(f"<th>{escape(name)}</th>" for name in table.headers)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(_format_cell(cell))}</td>' for cell in row)}</tr>"
                       for row in table.rows)
        return (f"<div><p>{escape(table.title)}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
                f"{f'<p>{escape(more)}</p>' if more else ''}</div>")


def _shortened(table: Table) -> tuple[Table, str]:
    more = len(table.rows) - NUM_SHOWN
    return table._replace(rows=table.rows[:NUM_SHOWN]), f"and {more:,} more" if more > 0 else ""


def format_table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """Lay out a table with aligned columns, numbers to the right.

    Nothing is cut or wrapped, so that the text can be searched and pasted.

    Args:
        rows: One sequence per line. Integers get thousands separators, floats four digits, None
            an empty cell; format anything else yourself.
        headers: One name per column.

    Returns:
        The lines, joined by newlines, without a trailing one.
    """
    from rich.cells import cell_len

    cells = [[str(header) for header in headers], *([_format_cell(cell) for cell in row] for row in rows)]
    widths = [max(cell_len(line[column]) for line in cells) for column in range(len(headers))]
    is_number = [
        any(row[column] is not None for row in rows) and all(_is_number(row[column]) for row in rows)
        for column in range(len(headers))
    ]

    def lay_out(line: list[str]) -> str:
        padded = []
        for cell, width, to_the_right in zip(line, widths, is_number, strict=True):
            space = " " * (width - cell_len(cell))
            padded.append(space + cell if to_the_right else cell + space)
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lay_out(cells[0]), rule, *(lay_out(line) for line in cells[1:])])


def _is_number(cell: object) -> bool:
    """Say whether a cell is to the right: a number, a missing one, or text that begins like one."""
    if cell is None or isinstance(cell, int | float):
        return True
    return isinstance(cell, str) and cell.strip().lstrip("+-").strip()[:1].isdigit()


def _format_cell(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.4g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return visible(str(cell)).replace("\n", "\\n").replace("\t", "\\t")
