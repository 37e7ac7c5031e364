"""Number formats such as 1,200 and 3,5 and $10 and 45%, and detection of numeric columns that do not parse.

The format of a file is configured (`Csv(decimal=, thousands=, units=, brackets=, missing=)`), never guessed: 1,200 is
ambiguous. `doubt` finds the columns that need such a setting, and which.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lab.errors import UserError

MISSING = frozenset({"", "na", "n/a", "nan", "null", "?"})  # missing values, in lower case
MOSTLY = 0.9  # a column with more than this share of numbers is numeric, and its other values are errors
ALIKE = 0.75  # if this share could be numbers in another format, the column's type must be configured
SPACES = " \u00a0\u2009\u202f\u2007"  # all are used as thousands separators
QUOTES = "'\u2019"
MINUS = str.maketrans(dict.fromkeys("\u2212\ufe63\uff0d\u2013", "-"))  # characters that look like a minus
_CURRENCY = "$\u00a2-\u00a5\u20a0-\u20cf"
_ABOUT = "<>\u2264\u2265~\u2248"  # <0.5, ~20: a limit or an estimate among measurements
_NOTES = "*\u2020\u2021"  # 12.3*: a footnote mark
# Further words that may denote a missing number.
_MARK = re.compile(r"[-\u2012-\u2015\u2212.*_~/\\]+|#n/?a|#[a-z]+[/0-9a-z]*[!?]|<na>|n\.a\.?|n\.?[dr]\.?|n/[dr]|none"
                   r"|nil|missing|unknown|not (available|applicable|reported)|tb[ad]|x+", re.IGNORECASE)
_LOOKS = re.compile(
    rf"(?P<open>\()?\s*[-+]?\s*(?P<before>[{_CURRENCY}{_ABOUT}]|[A-Z]{{1,3}}[{_CURRENCY}]|Rs\.?|[A-Z]{{3}}(?=[\s\d-]))?"
    rf"\s*[-+]?\s*"
    rf"(?P<body>(?:\d{{1,3}}(?:(?P<group>[,.{SPACES}{QUOTES}])\d{{2,3}}(?:(?P=group)\d{{2,3}})*)?|\d+)(?:[.,]\d*)?|[.,]\d+)"
    rf"(?:[eE][-+]?\d+)?\s*(?P<after>[%\u2030\u00b0{_NOTES}{_CURRENCY}]|[A-Z]{{3}}|[^\W\d_]{{1,4}}[\u00b2\u00b3]?)?"
    rf"\s*(?P<close>\))?")


@dataclass(frozen=True)
class NumberFormat:
    """A file's number format and its words for missing values. See the fields of `Csv`."""

    decimal: str = "."
    thousands: str = ""
    units: tuple[str, ...] = ()
    brackets: bool = False
    missing: tuple[str, ...] = ()

    def validate(self) -> None:
        """UserError for marks that contradict each other."""
        if self.decimal not in (".", ","):
            raise UserError(f"--data.source.decimal is . or , not {self.decimal!r}.")
        if self.thousands not in ("", ",", ".", " ", "'", "_") or self.thousands == self.decimal:
            raise UserError(f"--data.source.thousands is one of , . ' _ or a space, and not the decimal mark, not "
                            f"{self.thousands!r}.")

    def is_missing(self, cell: str) -> bool:
        """Whether a cell is a missing value."""
        text = cell.strip().lower()
        return text in MISSING or bool(self.missing) and text in {mark.strip().lower() for mark in self.missing}

    def number(self, cell: str) -> float | None:
        """The number in a cell, or None if it does not parse. "1_000" parses only if `thousands` allows it."""
        text = cell.strip().translate(MINUS)
        if self.brackets and text.startswith("(") and text.endswith(")"):
            text = "-" + text[1:-1].strip()
        if self.units:
            text = self._without_units(text)
        if self.thousands:
            text = self._joined(text)
        if self.decimal != ".":
            text = "?" if "." in text else text.replace(self.decimal, ".")
        try:
            return None if "_" in text else float(text)
        except ValueError:
            return None

    def _without_units(self, text: str) -> str:
        sign = ""
        if text[:1] in ("-", "+"):
            sign, text = text[0], text[1:].strip()
        for unit in filter(None, self.units):
            text = text.removeprefix(unit).removesuffix(unit).strip()
        return sign + text

    def _joined(self, text: str) -> str:
        """Removes thousands separators; the last group must have three digits."""
        marks = {" ": SPACES, "'": QUOTES}.get(self.thousands, self.thousands)
        whole, mark, rest = text.partition(self.decimal)
        if re.fullmatch(rf"[-+]?\s*\d{{1,3}}(?:[{re.escape(marks)}]\d{{2,3}})*[{re.escape(marks)}]\d{{3}}", whole):
            whole = re.sub(rf"[\s{re.escape(marks)}]", "", whole)
        return whole + mark + rest

    def parse(self, cells: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """(float64 (n,), NaN if a cell is missing or does not parse; bool (n,), True if it does not parse)."""
        read = [np.nan if self.is_missing(cell) else self.number(cell) for cell in cells]
        odd = np.array([value is None for value in read], bool)
        return np.array([np.nan if value is None else value for value in read], np.float64), odd

    def is_numeric(self, cells: Iterable[str]) -> bool:
        """Whether more than 90 % of the non-missing cells are numbers."""
        read, odd = self.parse(cells)
        numeric = int((~np.isnan(read)).sum())
        return numeric > MOSTLY * (numeric + int(odd.sum()))

    def counted(self, cells: Iterable[str]) -> bool:
        """Whether a cell has a unit or a thousands separator, which class labels do not have."""
        plain = NumberFormat(self.decimal)
        return any(plain.number(cell) is None and self.number(cell) is not None for cell in cells)

    def lines(self) -> dict[str, str]:
        """The settings that differ from the default, to print."""
        said = [f"decimal mark {self.decimal}"] if self.decimal != "." else []
        said += [f"{self.thousands!r} between thousands"] if self.thousands else []
        said += [f"units {', '.join(self.units)}"] if self.units else []
        said += ["brackets are minus"] if self.brackets else []
        said += [f"missing is also {', '.join(map(repr, self.missing))}"] if self.missing else []
        return {"numbers are written with": ", ".join(said)} if said else {}


PLAIN = NumberFormat()
Fields = dict[str, set[str]]
"""Field of `Csv` -> values to set; "comma": an ambiguous comma, which the user must resolve."""


def doubt(cells: Sequence[str], form: NumberFormat) -> Fields:
    """The fields to set so that a non-numeric column parses as numbers; {} if it is text.

    `cells`: those of the training rows. A column is in doubt if three quarters of its values are numbers in this or
    another format. Words for missing values do not count, nor do one or two words among numbers.
    """
    values = [cell.strip().translate(MINUS) for cell in cells if not form.is_missing(cell)]
    odd = [value for value in values if form.number(value) is None]
    numbers = len(values) - len(odd)
    looks = {value: _LOOKS.fullmatch(value) for value in sorted(set(odd))}
    looks = {value: found for value, found in looks.items() if found and bool(found["open"]) == bool(found["close"])}
    looks = _with_one_unit([value for value in odd if value in looks], looks, len(values))
    rest = Counter(value for value in odd if value not in looks)
    marks = {value for value in rest if _MARK.fullmatch(value)}
    words = set(rest) - marks
    alike = numbers + sum(value in looks for value in odd)
    if len(words) <= 2 and alike > len(values) / 2 and len({*values} - set(rest)) > 5 * len(words):
        marks |= words
    text = sum(n for value, n in rest.items() if value not in marks)
    if not alike or alike < ALIKE * (alike + text):
        return {}
    return _fields(list(looks.values())) | ({"missing": marks} if marks else {})


def _with_one_unit(odd: list[str], looks: dict[str, re.Match], total: int) -> dict[str, re.Match]:
    """Drops matches with a unit of letters, unless most cells share it: keeps 12 kg, drops Q1, 3rd and 4WD. Drops marks
    next to few short numbers, unless most cells have none: drops <30 and >30, or 4* and 5*.
    """
    units = Counter((looks[value]["after"] or "") + (looks[value]["before"] or "") for value in odd)
    few = all(len(found["body"]) <= 2 for found in looks.values()) and len(set(odd)) <= 10
    marks = set(_ABOUT + _NOTES) if few and len(odd) > total / 2 else set()
    good = {unit for unit, n in units.items() if not any(c.isalpha() or c in marks for c in unit)
            or (n > total / 2 and not few) or unit.isupper() and len(unit) == 3}
    return {value: found for value, found in looks.items() if (found["after"] or "") + (found["before"] or "") in good}


def _fields(found: list[re.Match]) -> Fields:
    """The fields to set for these matches."""
    bodies = [match["body"] for match in found]
    units = {unit.strip() for match in found for unit in (match["before"], match["after"]) if unit}
    groups = {" " if mark in SPACES else "'" for body in bodies for mark in body if mark in SPACES + QUOTES}
    commas = [body for body in bodies if "," in body]
    fields = {"units": units} | ({"brackets": {""}} if any(match["open"] for match in found) else {})
    if any(body.rfind(",") > body.rfind(".") >= 0 or body.count(",") == 1 and re.search(r"^0?,|,(\d?\d?|\d{4,})$", body)
           for body in commas):
        fields["decimal"] = {","}
        groups |= {"."} if any("." in body for body in bodies) else set()
    elif any(body.count(",") > 1 or "." in body for body in commas):
        groups |= {","}
    elif commas:
        fields["comma"] = {commas[0]}
    elif any(body.count(".") > 1 for body in bodies):
        groups |= {"."}
    return {name: values for name, values in (fields | {"thousands": groups}).items() if values}


def flags(fields: Fields) -> str:
    """The command-line flags for these fields."""
    said = []
    for name, values in fields.items():
        if name == "comma":
            one = min(values)
            said.append(f"--data.source.thousands , (if {one} is {one.replace(',', '')}) or --data.source.decimal , "
                        f"(if it is {one.replace(',', '.')})")
        else:
            said.append(f"--data.source.{name} {' '.join(map(_quoted, sorted(values)[:6]))}".strip())
    return " and ".join(said)


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w.,%-]*", text) else f'"{text}"' if "'" in text else f"'{text}'"
