"""Groups of records, such as those of a column `sex`: a field of a record for each of its values, for metrics by group.

A record has the fields sex=female and sex=male, uint8 (), 1 for its group and 0 for the others, which
`Classify(groups="sex")` and `Regress(groups="sex")` read. Data of your own may have them too, also for groups that
overlap.
"""

from collections.abc import Sequence

import numpy as np

from lab.data.pipeline import Batch
from lab.data.tables.columns import Columns, labels, some
from lab.errors import UserError

MOST = 50  # groups of one column
MISSING = "missing"  # the group of records without a value


def group_fields(tables: Sequence[Columns], column: str) -> list[Batch]:
    """COLUMN=VALUE -> uint8 (n,), for each of `tables`, the parts of one data set. The column may be one of those left
    out of the inputs (`Columns.dropped`). Records without a value are a group of their own.

    Raises:
      UserError: there is no such column, it has one value only, or too many to be groups.
    """
    cells = [_cells(table, column) for table in tables]
    first, found = tables[0].title, sorted({value for own in cells for value in own})
    if len(found) < 2:
        raise UserError(f"--task.groups {column}: all {len(cells[0]):,} records of {first} have the value "
                        f"{found[0]!r}; there is nothing to compare.")
    if len(found) > MOST or 2 * len(found) > max(sum(map(len, cells)), 4):
        raise UserError(f"--task.groups {column} has {len(found):,} different values in {sum(map(len, cells)):,} "
                        f"records of {first} ({some(found)}), which are not groups (at most {MOST}, with two records "
                        f"each on average). Put numbers into ranges, such as 18-29, in a column of their own.")
    return [{f"{column}={value}": np.array([cell == value for cell in own], np.uint8) for value in found}
            for own in cells]


def _cells(table: Columns, column: str) -> list[str]:
    """The values of one column, on one line each; "1.0" is 1."""
    whole = Columns(table.title, table.cells | table.dropped, table.lines, table.form)
    return [" ".join(value.split()) or MISSING for value in labels(whole, column)]


def counted(fields: Batch, column: str) -> dict[str, str]:
    """A line to print: the size of each group."""
    sizes = [f"{name.removeprefix(f'{column}=')} {int(values.sum()):,}" for name, values in fields.items()
             if name.startswith(f"{column}=")]
    return {f"groups by {column}": ", ".join(sizes)}
