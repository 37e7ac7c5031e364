"""Tables of numbers and categories."""

from lab.data.tables.bundled import Sklearn
from lab.data.tables.csv_files import Csv
from lab.data.tables.tables import Table

__all__ = ["Csv", "Sklearn", "Table"]
