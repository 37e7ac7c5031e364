"""Number formats such as 1,200 and 3,5 and $10 and 45%, and detection of numeric columns that do not parse.

The format of a file is configured (`Csv(decimal=, thousands=, units=, brackets=, missing=)`), never guessed: 1,200 is
ambiguous. `doubt` finds the columns that need such a setting, and which.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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
_NOTES = "*\u2020\u2021+"  # 12.3*: a footnote mark; 1,000+: at least
_LETTER = r"[^\W\d_\u00bc-\u00be\u2150-\u215e]"  # no \u00bd
# Units that multiply, as they are written. A letter of the second table may be another unit, too (metres, bytes).
_TIMES = {"k": "1e3", "K": "1e3", "M": "1e6", "MM": "1e6", "Cr": "1e7", "\u4e07": "1e4", "\u842c": "1e4",
          "\u4ebf": "1e8", "\u5104": "1e8"}
_TIMES |= {word: factor for factor, words in {
    "1e3": "thousand tsd", "1e5": "lakh lakhs lac", "1e6": "mn mio mln mill million millions", "1e7": "crore crores",
    "1e9": "bn bln mrd mld billion billions", "1e12": "tn trn trillion trillions"}.items() for word in words.split()}
_PERHAPS = {"m": "1e6", "b": "1e9", "B": "1e9", "t": "1e12", "T": "1e12"}
# Further words that may denote a missing number.
_MARK = re.compile(r"[-\u2012-\u2015\u2212.*_~/\\]+|#n/?a|#[a-z]+[/0-9a-z]*[!?]|<na>|n\.a\.?|n\.?[dr]\.?|n/[dr]|none"
                   r"|nil|missing|unknown|not (available|applicable|reported)|tb[ad]|x+", re.IGNORECASE)
_LOOKS = re.compile(
    rf"(?P<open>\()?\s*[-+]?\s*(?P<before>[{_CURRENCY}{_ABOUT}]|[A-Z]{{1,3}}[{_CURRENCY}]|Rs\.?|[A-Z]{{3}}(?=[\s\d-]))?"
    rf"\s*[-+]?\s*"
    rf"(?P<body>(?:\d{{1,3}}(?:(?P<group>[,.{SPACES}{QUOTES}])\d{{2,3}}(?:(?P=group)\d{{2,3}})*)?|\d+)(?:[.,]\d*)?|[.,]\d+)"
    rf"(?:[eE][-+]?\d+)?\s*(?P<after>[%\u2030\u00b0{_NOTES}{_CURRENCY}]"
    rf"|[\u00b0{_CURRENCY}]?(?:{_LETTER}{{1,12}}[\u00b2\u00b3]?[{_CURRENCY}]?)?(?:\s?/\s?{_LETTER}{{1,6}}[\u00b2\u00b3]?)?)?"
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
        for unit, factor in self._factors.items():
            if not (np.isfinite(factor) and factor):
                raise UserError(f"--data.source.units {unit}=...: after = stands a number, what one {unit} is worth, "
                                f"as in k=1e3.")

    @functools.cached_property
    def _factors(self) -> dict[str, float]:
        """Unit -> what one is worth, NaN if that is not a number; longest first: km before m."""
        found = {}
        for text in self.units:
            unit, has, factor = text.rpartition("=")
            if not (has and unit):
                found[text] = 1.0
                continue
            try:
                found[unit] = float(factor)
            except ValueError:
                found[unit] = np.nan
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))

    def is_missing(self, cell: str) -> bool:
        """Whether a cell is a missing value."""
        text = cell.strip().lower()
        return text in MISSING or bool(self.missing) and text in {mark.strip().lower() for mark in self.missing}

    def number(self, cell: str) -> float | None:
        """The number in a cell, or None if it does not parse. "1_000" parses only if `thousands` allows it."""
        text, factor = cell.strip().translate(MINUS), 1.0
        if self.brackets and text.startswith("(") and text.endswith(")"):
            text = "-" + text[1:-1].strip()
        if self.units:
            text, found = self._without_units(text)
            factor = math.prod(self._factors[unit] for unit in found)
        if self.thousands:
            text = self._joined(text)
        if self.decimal != ".":
            text = "?" if "." in text else text.replace(self.decimal, ".")
        try:
            return None if "_" in text else float(text) * factor
        except ValueError:
            return None

    def _without_units(self, text: str) -> tuple[str, list[str]]:
        """The text without its units, and these."""
        sign, found = "", []
        if text[:1] in ("-", "+"):
            sign, text = text[0], text[1:].strip()
        for unit in filter(None, self._factors):
            short = text.removeprefix(unit).removesuffix(unit).strip()
            found += [unit] if short != text else []
            text = short
        return sign + text, found

    def mixed(self, cells: Iterable[str]) -> list[str]:
        """The units without a factor that cells of one column do not share, so that their numbers do not compare."""
        if not self.units:
            return []
        worth = {text.rpartition("=")[0] for text in self.units if "=" in text[1:]} | set(_ABOUT + _NOTES)
        read = [cell for cell in cells if not self.is_missing(cell) and self.number(cell) is not None]
        return _unshared({frozenset(self._without_units(cell.strip().translate(MINUS))[1]) - worth for cell in read})

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
        notes = [f"decimal mark {self.decimal}"] if self.decimal != "." else []
        notes += [f"{self.thousands!r} between thousands"] if self.thousands else []
        notes += [f"units {', '.join(self.units)}"] if self.units else []
        notes += ["brackets are minus"] if self.brackets else []
        notes += [f"missing is also {', '.join(map(repr, self.missing))}"] if self.missing else []
        return {"numbers are written with": ", ".join(notes)} if notes else {}


PLAIN = NumberFormat()
Fields = dict[str, set[str]]
"""Field of `Csv` -> values to set; "comma": an ambiguous comma, which the user must resolve; "unclear": a value for
which no field helps."""


def _unshared(kinds: Iterable[Iterable[str]]) -> list[str]:
    """The units that not all numbers of a column have. `kinds`: the units of each number. A number without any counts
    only beside units that multiply (2k and 300, but not 12 kg and 13).
    """
    units = {frozenset(kind) for kind in kinds}
    every = frozenset().union(*units)
    if not every & _TIMES.keys():
        units -= {frozenset()}
    return sorted(every) if len(units) > 1 else []


def doubt(cells: Sequence[str], form: NumberFormat) -> Fields:
    """The fields to set so that a non-numeric column parses as numbers; {} if it is text.

    `cells`: those of the training rows. A column is in doubt if three quarters of its values are numbers in this or
    another format. Words for missing values do not count, nor do one or two words among numbers. Fields that do not
    make numbers of nine tenths of them are "unclear".
    """
    values = [cell.strip().translate(MINUS) for cell in cells if not form.is_missing(cell)]
    odd = [value for value in values if form.number(value) is None]
    numbers = len(values) - len(odd)
    looks = {value: _LOOKS.fullmatch(value) for value in sorted(set(odd))}
    looks = {value: found for value, found in looks.items() if found and bool(found["open"]) == bool(found["close"])}
    looks = _of_amounts([value for value in odd if value in looks], looks, len(values))
    rest = Counter(value for value in odd if value not in looks)
    marks = {value for value in rest if _MARK.fullmatch(value)}
    words = set(rest) - marks
    alike = numbers + sum(value in looks for value in odd)
    if len(words) <= 2 and alike > len(values) / 2 and len({*values} - set(rest)) > 5 * len(words):
        marks |= words
    text = sum(n for value, n in rest.items() if value not in marks)
    if not alike or alike < ALIKE * (alike + text):
        return {}
    fields = _fields(list(looks.values()), numbers) | ({"missing": marks} if marks else {})
    return fields if _work(fields, form, [*looks]) else {"unclear": {min(looks, key=len)}}


def _of_amounts(odd: list[str], looks: dict[str, re.Match], total: int) -> dict[str, re.Match]:
    """Drops matches with a unit of letters, unless it multiplies, most cells share it, or there are few units: keeps
    12 kg, 2k, 48.1N and 16.3E, drops Q1, 3rd and 4WD. Drops marks next to few short numbers, unless most cells have
    none: drops <30 and >30, or 4* and 5*.
    """
    kinds = {value: _units(found) for value, found in looks.items()}
    count = Counter(kinds[value] for value in odd)
    few = all(len(found["body"]) <= 2 for found in looks.values()) and len(set(odd)) <= 10
    marks = set(_ABOUT + _NOTES) if few and len(odd) > total / 2 else set()
    times = _times(looks.values())
    letters = {kind for kind in count if any(any(map(str.isalpha, unit)) and unit not in times
                                             and not (unit.isupper() and len(unit) == 3) for unit in kind)}
    rare = len(letters) > 4 or min((count[kind] for kind in letters), default=0) < 2
    good = {kind for kind, n in count.items() if not marks & set(kind)
            and (kind not in letters or not few and (n > total / 2 or not rare))}
    return {value: found for value, found in looks.items() if kinds[value] in good}


def _units(found: re.Match) -> tuple[str, ...]:
    return tuple(unit.strip() for unit in (found["before"], found["after"]) if unit)


def _times(found: Iterable[re.Match]) -> dict[str, str]:
    """The units among these that multiply -> factor."""
    all_units = [_units(match) for match in found]
    sure = {unit: factor for units in all_units for unit in units
            if (factor := _TIMES.get(unit if len(unit) < 3 else unit.lower()))}
    perhaps = {units[-1] for units in all_units if units and units[-1] in _PERHAPS
               and (sure or len(units) == 2 and re.fullmatch(rf"[A-Z]*[{_CURRENCY}]", units[0]))}
    return sure | {unit: _PERHAPS[unit] for unit in perhaps}


def _fields(found: list[re.Match], plain: int) -> Fields:
    """The fields to set for these matches; `plain`: number of cells that are numbers already."""
    bodies = [match["body"] for match in found]
    times, kinds = _times(found), {frozenset(_units(match)) for match in found} | ({frozenset()} if plain else set())
    mixed = set(_unshared(kind.difference(_ABOUT, _NOTES, times) for kind in kinds))
    units = {f"{unit}={times[unit]}" if unit in times else f"{unit}=?" if unit in mixed else unit
             for kind in kinds for unit in kind}
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
        fields["decimal"], groups = {","}, groups | {"."}
    return {name: values for name, values in (fields | {"thousands": groups}).items() if values}


def _work(fields: Fields, form: NumberFormat, cells: list[str]) -> bool:
    """Whether these fields make numbers of more than nine tenths of the cells."""
    units = form.units + tuple(unit.replace("=?", "=1") for unit in fields.get("units", ()))
    new = replace(form, units=units, brackets=form.brackets or "brackets" in fields,
                  decimal=min(fields.get("decimal", form.decimal)),
                  thousands=min(fields.get("thousands", form.thousands), default=""))
    tries = [replace(new, decimal=","), replace(new, thousands=",")] if "comma" in fields else [new]
    return not cells or any(sum(f.number(cell) is not None for cell in cells) > MOSTLY * len(cells) for f in tries)


def flags(fields: Fields) -> str:
    """The command-line flags for these fields."""
    words = []
    for name, values in fields.items():
        if name == "comma":
            one = min(values)
            words.append(f"--data.source.thousands , (if {one} is {one.replace(',', '')}) or --data.source.decimal , "
                         f"(if it is {one.replace(',', '.')})")
        elif name != "unclear":
            some = [_quoted(value) for value in sorted(values)[:6]]
            words.append(f"--data.source.{name} {' '.join(some)}".strip())
            words[-1] += " (? is what one is worth)" if any("=?" in value for value in values) else ""
    return " and ".join(words)


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w.,%=+-]*", text) else f'"{text}"' if "'" in text else f"'{text}'"
