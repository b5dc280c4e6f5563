"""Write runs as a table of plain text."""

from collections.abc import Sequence

from rich.cells import cell_len

from pipeline.printable import in_line
from tools.listing.columns import COLUMNS, Column
from trainer.monitor.summary import Summary

_GAP = 2  # blanks between columns


def table(runs: Sequence[Summary], width: int | None = None) -> str:
    """Return a table with a line for each run.

    width: of the terminal. Columns that do not fit into it are left out, and a last line names them.
    """
    cells = {column: [in_line(column.text(run)) for run in runs] for column in COLUMNS}
    widths = {column: max(map(cell_len, [column.heading, *texts])) for column, texts in cells.items()}
    shown = list(COLUMNS)
    while width and len(shown) > 1 and sum(widths[each] + _GAP for each in shown) - _GAP > width:
        shown.pop()
    rows = [[each.heading for each in shown], *zip(*(cells[each] for each in shown), strict=True)]
    gap = " " * _GAP
    lines = [gap.join(map(_padded, row, [widths[each] for each in shown], shown)) for row in rows]
    if left_out := COLUMNS[len(shown) :]:
        lines += ["", f"not shown, for want of width: {', '.join(each.heading for each in left_out)}"]
    return "\n".join(line.rstrip() for line in lines)


def _padded(text: str, width: int, column: Column) -> str:
    blanks = " " * (width - cell_len(text))
    return text + blanks if column.is_text else blanks + text
