"""Numbers as people write them: read where it is said how, refused with the flag where it is not, never categories."""

import csv
import re

import numpy as np
import pytest

from lab.data.tables.csv_files import Csv
from lab.data.tables.numbers import PLAIN, NumberFormat, doubt, flags
from lab.data.tables.tables import Table
from lab.errors import UserError

N = 60
PLAIN_X = np.round(np.random.default_rng(0).uniform(-5000, 5000, N), 2)


def accumulation_dtype(how, at=slice(None)):
    return [how(float(x)) for x in PLAIN_X[at]]


def grouped(mark, decimal):
    return lambda x: f"{x:,.2f}".replace(",", "_").replace(".", decimal).replace("_", mark)


def accounts(x):
    return f"({-x:.2f})" if x < 0 else f"{x:.2f}"


def gap(mark, every=4):
    """Every fourth value is missing, and stands as `mark`."""
    return lambda x: mark if round(x * 100) % every == 0 else f"{x:.2f}"


# How a column is written, the fields that say so, and what must be advised where they are not given.
WAYS = {
    "decimal comma": (lambda x: f"{x:.2f}".replace(".", ","), {"decimal": ","}, "--data.source.decimal ,"),
    "1,200.50": (grouped(",", "."), {"thousands": ","}, "--data.source.thousands ,"),
    "1.200,50": (grouped(".", ","), {"thousands": ".", "decimal": ","}, "--data.source.decimal ,"),
    "1 200,50": (grouped(" ", ","), {"thousands": " ", "decimal": ","}, "--data.source.thousands ' '"),
    "NBSP": (grouped("\u00a0", "."), {"thousands": " "}, "--data.source.thousands ' '"),
    "narrow NBSP": (grouped("\u202f", ","), {"thousands": " ", "decimal": ","}, "--data.source.decimal ,"),
    "1'200.50": (grouped("'", "."), {"thousands": "'"}, "--data.source.thousands \"'\""),
    "$10": (lambda x: f"${x:.2f}", {"units": ("$",)}, "--data.source.units '$'"),
    "-$10": (lambda x: f"{'-' * (x < 0)}${abs(x):.2f}", {"units": ("$",)}, "--data.source.units '$'"),
    "€ and thousands": (lambda x: f"{x:,.2f} €", {"units": ("€",), "thousands": ","}, "--data.source.units '€'"),
    "USD": (lambda x: f"USD {x:.2f}", {"units": ("USD",)}, "--data.source.units USD"),
    "45%": (lambda x: f"{x:.2f}%", {"units": ("%",)}, "--data.source.units %"),
    "kg": (lambda x: f"{x:.2f} kg", {"units": ("kg",)}, "--data.source.units kg"),
    "below a limit": (lambda x: f"{'<' * (round(x * 100) % 4 == 0)}{x:.2f}", {"units": ("<",)}, "units '<'"),
    "footnotes": (lambda x: f"{x:.2f}{'*' * (round(x * 100) % 4 == 0)}", {"units": ("*",)}, "units '*'"),
    "accounts": (accounts, {"brackets": True}, "--data.source.brackets"),
    "a dash": (gap("-"), {"missing": ("-",)}, "--data.source.missing -"),
    "#N/A": (gap("#N/A"), {"missing": ("#N/A",)}, "--data.source.missing '#N/A'"),
    "None": (gap("None"), {"missing": ("None",)}, "--data.source.missing None"),
    "withheld": (gap("withheld"), {"missing": ("Withheld",)}, "--data.source.missing withheld"),
    "two dots": (gap(".."), {"missing": ("..",)}, "--data.source.missing .."),
}


def table(tmp_path, column, role="x", **fields):
    """A table whose feature or target is written so."""
    path = tmp_path / "t.csv"
    rows = [("x", "y")] + [(cell, f"{i / 7:.3f}") if role == "x" else (f"{i / 7:.3f}", cell)
                           for i, cell in enumerate(column)]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="|").writerows(rows)
    return Table(Csv(str(path), "y", **fields))


def features(data):
    return np.sort(np.concatenate([r.arrays["inputs"][:, 0] for r in (data.train, data.validation, data.test)]))


@pytest.mark.parametrize("way", WAYS)
def test_a_feature_is_read_as_said_and_refused_if_nothing_is_said(tmp_path, way):
    how, fields, flag = WAYS[way]
    with pytest.raises(UserError, match=rf"in the column 'x' .*{re.escape(flag)}"):
        table(tmp_path, accumulation_dtype(how)).load()
    options = fields | ({} if fields.get("decimal") != "," else {})
    plain = {"decimal": "."}
    given = table(tmp_path, accumulation_dtype(how), **options)
    if options.get("decimal") == ",":  # the target of this table, too
        text = (tmp_path / "t.csv").read_text(encoding="utf-8")
        (tmp_path / "t.csv").write_text(re.sub(r"\|(\d+)\.(\d+)", r"|\1,\2", text), encoding="utf-8")
    data = given.load()
    wanted = table(tmp_path, [f"{x:.2f}" if "missing" not in fields or how(x) == f"{x:.2f}" else "" for x in PLAIN_X],
                   **plain).load()
    np.testing.assert_array_equal(features(data), features(wanted))
    assert data.metadata == {"features": 1} and data.summary["task"] == "regression"
    assert "numbers are written with" in data.summary and "numbers are written with" not in wanted.summary
    assert data.fingerprint != wanted.fingerprint


@pytest.mark.parametrize("way", [way for way in WAYS if "missing" not in WAYS[way][1]])
@pytest.mark.parametrize("distinct", [7, N])
def test_a_target_is_never_classes_of_prices(tmp_path, way, distinct):
    """Also of seven different prices."""
    how, fields, flag = WAYS[way]
    column = [accumulation_dtype(how)[i % distinct] for i in range(N)]
    with pytest.raises(UserError, match=re.escape(flag)):
        table(tmp_path, column, "y").load()
    if fields.get("decimal") != ",":
        data = table(tmp_path, column, "y", **fields).load()
        assert data.classes == () and data.summary["task"] == "regression"


def test_seven_whole_prices_are_numbers(tmp_path):
    """Whole numbers with few values would be classes, if they were not written as amounts."""
    column = [f"{1000 + 500 * (i % 7):,}" for i in range(N)]
    with pytest.raises(UserError, match=r"thousands , \(if 1,000 is 1000\) or --data.source.decimal , \(if it is 1."):
        table(tmp_path, column, "y").load()
    data = table(tmp_path, column, "y", thousands=",").load()
    assert data.classes == () and data.target.mean == pytest.approx(2500, rel=0.1)
    assert table(tmp_path, column, "y", task="classification").load().classes == tuple(sorted(set(column)))
    assert len(table(tmp_path, [str(i % 7) for i in range(N)], "y", thousands=",").load().classes) == 7


@pytest.mark.parametrize("values", [
    ["red", "green", "blue"], ["Q1", "Q2", "Q3", "Q4"], ["1st", "2nd", "3rd"], ["4WD", "2WD"], ["a", "b", "None"],
    ["2020-01-05", "2020-02-05"], ["12:30", "13:45"], ["22-23", "24-25", "26-29", "30-34", "65+"], ["-", "yes"],
    ["12", "13", "22-23", "24-25", "26-29", "30-34"], ["A+", "A-", "B"], ["AB12", "CD34"], ["1/2", "3/4"],
    ["1.2.3", "2.0"]])
def test_categories_stay_categories(tmp_path, values):
    data = table(tmp_path, [values[i % len(values)] for i in range(N)]).load()
    assert data.metadata == {"features": len(values)} and "column x" in data.summary


def test_a_column_may_be_called_categorical(tmp_path):
    column = [f"{10 * (i % 3)}%" for i in range(N)]
    with pytest.raises(UserError, match="--data.source.categorical"):
        table(tmp_path, column).load()
    data = table(tmp_path, column, categorical=("x",)).load()
    assert data.metadata == {"features": 3} and data.feature_names == ["x=0%", "x=10%", "x=20%"]
    numbers = table(tmp_path, [str(i % 3) for i in range(N)], categorical=("x",)).load()
    assert numbers.metadata == {"features": 3}
    with pytest.raises(UserError, match="no column 'z'"):
        table(tmp_path, column, categorical=("z",)).load()


def test_all_doubtful_columns_are_in_one_message(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a|b|c|d|y\n" + "".join(f"${i}|{i}%|{'-' if i % 3 else i}|{i}|{i / 7:.2f}\n" for i in range(N)))
    with pytest.raises(UserError, match="columns 'a' .*'b' .*'c' ") as caught:
        Table(Csv(str(path), "y")).load()
    assert "--data.source.units '$' %" in str(caught.value) and "--data.source.missing -" in str(caught.value)
    data = Table(Csv(str(path), "y", units=("$", "%"), missing=("-",))).load()
    assert data.metadata == {"features": 4} and data.summary["numbers"] == "a, b, c, d"
    assert data.summary["read as missing"] == "- 40 times"


def test_new_records_are_read_as_training_was(tmp_path):
    data = table(tmp_path, accumulation_dtype(grouped(",", ".")), thousands=",").load()
    (tmp_path / "new.csv").write_text('x\n"1,234.50"\n1234.50\n')
    records = data.read(tmp_path / "new.csv").records
    assert records.arrays["inputs"][0, 0] == records.arrays["inputs"][1, 0]
    plain = table(tmp_path, accumulation_dtype(lambda x: f"{x:.2f}")).load()
    with pytest.raises(UserError, match=r"line 2, column 'x': '1,234.50' is not a number.*--data.source.thousands ,"):
        plain.read(tmp_path / "new.csv")


@pytest.mark.parametrize(("cell", "form", "wanted"), [
    ("\u22125", PLAIN, -5), ("\u20135", PLAIN, -5), (" 5 ", PLAIN, 5), ("1e3", PLAIN, 1000), ("1,200", PLAIN, None),
    ("1_200", PLAIN, None), ("$5", PLAIN, None), ("(5)", PLAIN, None),
    ("12,34,567.5", NumberFormat(thousands=","), 1234567.5), ("1,20", NumberFormat(thousands=","), None),
    ("1,2000", NumberFormat(thousands=","), None), ("-1,200", NumberFormat(thousands=","), -1200),
    ("10.8", NumberFormat(decimal=","), None), ("10,8", NumberFormat(decimal=","), 10.8),
    ("10,8,1", NumberFormat(decimal=","), None), ("1.234.567,8", NumberFormat(",", "."), 1234567.8),
    ("1\u2009200", NumberFormat(thousands=" "), 1200), ("(1,200)", NumberFormat(thousands=",", brackets=True), -1200),
    ("($1,200.50)", NumberFormat(thousands=",", units=("$",), brackets=True), -1200.5),
    ("$-5", NumberFormat(units=("$",)), -5), ("\u2212$5", NumberFormat(units=("$",)), -5),
    ("%", NumberFormat(units=("%",)), None),
    ("1_200", NumberFormat(thousands="_"), 1200), ("", PLAIN, None), ("- 5", PLAIN, None)])
def test_cells(cell, form, wanted):
    form.validate()
    assert form.number(cell) == wanted


def test_formats_that_contradict_themselves():
    for form in (NumberFormat(";"), NumberFormat(thousands="."), NumberFormat(",", ","), NumberFormat(thousands="x")):
        with pytest.raises(UserError, match="--data.source"):
            form.validate()


def test_bands_and_stars_are_no_numbers():
    assert doubt(["<30", ">30"] * 30, PLAIN) == {} and doubt(["3*", "4*", "5*"] * 20, PLAIN) == {}
    assert doubt(["<=50K", ">50K"] * 30, PLAIN) == {}


def test_what_is_advised_is_what_is_needed():
    """Following the advice for a random mixture of styles reads every cell as the number that it was."""
    for way, (how, fields, _) in WAYS.items():
        found = doubt(accumulation_dtype(how), PLAIN)
        wanted = {name: {value} if isinstance(value, str) else {""} if value is True else set(value)
                  for name, value in fields.items()}
        assert {k: {v.lower() for v in vs} for k, vs in found.items()} == \
            {k: {v.lower() for v in vs} for k, vs in wanted.items()}, way
        assert all(f"--data.source.{name}" in flags(found) for name in fields)


# ----------------------------------------------------------------------------------------------------- the file


def test_columns_without_a_name(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(",x,y\n" + "".join(f"{i},{i * i},{i / 7:.2f}\n" for i in range(N)))
    with pytest.raises(UserError, match="column 1 of 3 has no name .*'0', '1', '2'.*--data.source.drop 'column 1'"):
        Table(Csv(str(path), "y")).load()
    for drop in ("column 1", "1"):
        assert Table(Csv(str(path), "y", drop=(drop,))).load().metadata == {"features": 1}
    data = Table(Csv(str(path), "y", drop=("1",))).load()
    assert len(data.read(path).names) == N  # at prediction an index column without a name is passed over
    path.write_text("x,y,\n" + "".join(f"{i * i},{i / 7:.2f},\n" for i in range(N)))
    data = Table(Csv(str(path), "y")).load()
    assert data.metadata == {"features": 1} and data.summary["left out, empty and without a name"] == "column 3"
    path.write_text("1,2,y\n" + "".join(f"{i},{i * i},{i / 7:.2f}\n" for i in range(N)))
    assert Table(Csv(str(path), "y", drop=("2",))).load().feature_names == ["1"]  # a name wins over a place


def test_excels_line_that_names_the_separator(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("sep=;\nx;y\n" + "".join(f"{i};{i / 7:.2f}\n" for i in range(N)) + "bad\n")
    with pytest.raises(UserError, match=rf"line {N + 3}: 1 fields, but the header has 2"):
        Table(Csv(str(path), "y")).load()
    path.write_text(path.read_text().removesuffix("bad\n"))
    assert Table(Csv(str(path), "y")).load().metadata == {"features": 1}
    path.write_text('sep="\nx;y\n1;2\n')
    with pytest.raises(UserError, match="which cannot separate fields"):
        Table(Csv(str(path), "y")).load()


@pytest.mark.parametrize("value", ["9223372036854775808", "-9223372036854775809", "18446744073709551616", "1e36"])
def test_large_numbers_are_numbers(tmp_path, value):
    for role in ("x", "y"):
        data = table(tmp_path, [value if i % 9 == 0 else str(i) for i in range(N)], role).load()
        assert all(np.isfinite(array).all() for array in data.train.arrays.values())
        classes = table(tmp_path, [value if i % 2 else "1" for i in range(N)], "y").load().classes
        assert len(classes) == 2 and value in classes


@pytest.mark.parametrize("value", ["1e40", "-1e300", "1" + "0" * 400])
def test_numbers_beyond_float32_are_named(tmp_path, value):
    for role in ("x", "y"):
        with pytest.raises(UserError, match=rf"line 2, column '{role}'.*(is not finite|beyond 1e\+37)"):
            table(tmp_path, [value if i == 0 else f"{i}.5" for i in range(N)], role).load()


MAGNITUDES = [(2_700_000, "2.7M"), (1_500, "1.5k"), (3_210_000, "3.21M"), (999_000, "999k"), (40_500, "40.5k")]


def amounts(sign="", back=""):
    """60 cells such as 2.7M and 1.5k, and what they are."""
    at = [MAGNITUDES[i % 5] for i in range(N)]
    return [f"{sign}{text}{back}" for _, text in at], np.array([float(value) for value, _ in at])


@pytest.mark.parametrize(("sign", "units", "flag"), [
    ("", ("M=1e6", "k=1e3"), "units M=1e6 k=1e3"), ("$", ("$", "M=1e6", "k=1e3"), "units '$' M=1e6 k=1e3")])
def test_k_and_m_multiply(tmp_path, sign, units, flag):
    """Never categories, and never 2.7 beside 1.5."""
    cells, values = amounts(sign)
    with pytest.raises(UserError, match=re.escape(flag)):
        table(tmp_path, cells).load()
    with pytest.raises(UserError, match=re.escape(flag)):
        table(tmp_path, cells, "y").load()
    plain = tuple(unit.partition("=")[0] for unit in units)
    with pytest.raises(UserError, match="do not compare.*M=[?]"):  # the control: what was advised before
        table(tmp_path, cells, units=plain).load()
    form = table(tmp_path, cells, "y", units=units).source.form
    np.testing.assert_allclose([form.number(cell) for cell in cells], values, rtol=1e-12)
    data = table(tmp_path, cells, "y", units=units).load()
    assert data.summary["task"] == "regression" and data.target.mean == pytest.approx(values.mean(), rel=0.3)


@pytest.mark.parametrize("unit", ["k", "K", "M", "bn", " million", "mio", " Mrd", "lakh", "Cr", " thousand"])
def test_units_that_multiply_are_no_categories(tmp_path, unit):
    """Also of few short numbers, which would be categories with another unit."""
    for cells in ([f"{x / 100:.2f}{unit}" for x in PLAIN_X], [f"{1 + i % 7}{unit}" for i in range(N)]):
        with pytest.raises(UserError, match=rf"units {unit.strip()}=1e\d"):
            table(tmp_path, cells).load()
    assert table(tmp_path, [f"{1 + i % 7} doors" for i in range(N)]).load().metadata == {"features": 7}  # the control


@pytest.mark.parametrize(("cells", "flag"), [
    ([f"{i / 3:.2f}{'NS'[i % 2]}" for i in range(N)], "units 'N=?' 'S=?' (? is what one is worth)"),
    ([f"{i + 10}{'k' * (i % 2)}" for i in range(N)], "units k=1e3"),
    ([f"{i / 7:.2f} {('GB', 'MB')[i % 2]}" for i in range(N)], "units 'GB=?' 'MB=?'"),
    ([f"{i / 7:.2f} km/h" for i in range(N)], "units 'km/h'"), ([f"{i / 7:.2f}\u00b0C" for i in range(N)], "\u00b0C"),
    ([f"{i * 1000:,}+" for i in range(N)], "units + and --data.source.thousands ,"),
    ([f"{i + 1}.{i % 12 + 1:02d}.2007" for i in range(N)], "no setting makes numbers of all"),
    ([f"{i * 12345678:,}".replace(",", ".") for i in range(N)], "decimal , and --data.source.thousands .")])
def test_units_that_differ_and_forms_that_no_field_reads(tmp_path, cells, flag):
    with pytest.raises(UserError, match=re.escape(flag)):
        table(tmp_path, cells).load()


def test_a_factor_is_a_number():
    with pytest.raises(UserError, match="what one S is worth"):
        NumberFormat(units=("N=1", "S=?")).validate()
    form = NumberFormat(units=("km=1000", "m", "%=0.01"))
    assert [form.number(cell) for cell in ("5 km", "-5m", "45%", "7")] == [5000, -5, 0.45, 7]


@pytest.mark.parametrize("cells", [
    [f"{2000 + i // 12}-{i % 12 + 1:02d}-03" for i in range(N)], [f"{i}-{i + 10}" for i in range(N)],
    [f"{i}.5\u00b10.1" for i in range(N)], [hex(i + 4096) for i in range(N)], [f"{i}/7" for i in range(N)]])
def test_dates_and_ranges_are_no_categories(tmp_path, cells):
    with pytest.raises(UserError, match="column 'x': 43 different texts .*--data.source.drop"):
        table(tmp_path, cells).load()
    few = table(tmp_path, [cells[i % 5] for i in range(N)]).load()  # the control: each occurs often
    assert few.metadata == {"features": 5}


@pytest.mark.parametrize(("head", "rows", "words"), [
    ("a, b, c;y", [f"{i};{i / 7:.2f}" for i in range(N)], None),
    ("x,y", [*["1,2.5"] * 9, "x,y", "3,4"], "header again"),
    ("x,y", [*["   "] * 3, *[f"{i},{i / 7:.2f}" for i in range(N)]], None), ("x:y", ["1:2"] * 9, "separators known"),
    ("# made, by hand", [f"{i},{i / 7:.2f},1" for i in range(N)], "line 1, is '# made'"),
    ("<!DOCTYPE html><html>", ["<body>"], "web page"), ('{"x": 1, "y": 2}', ['{"x": 1, "y": 3}'], "JSON"),
    ("version https://git-lfs.github.com/spec/v1", ["oid"], "git lfs pull"),
    ("x,y", [f"{i},2.5" for i in range(N)], "the target is 2.5 in all")])
def test_what_a_file_is(tmp_path, head, rows, words):
    (tmp_path / "t.csv").write_text("\n".join([head, *rows, ""]), encoding="utf-8")
    data = Table(Csv(str(tmp_path / "t.csv"), "y"))
    if words is None:
        assert data.load().metadata == {"features": 1}
    else:
        with pytest.raises(UserError, match=re.escape(words)):
            data.load()


def test_numbers_that_may_be_codes_or_missing_are_said(tmp_path):
    said = table(tmp_path, [f"0{n}" if n < 10 else str(n) for n in range(60)]).load().summary
    assert "--data.source.categorical" in said["numbers with leading zeros"]
    for mark in ("-999", "99999", "-1"):
        said = table(tmp_path, [str(n % 40) for n in range(55)] + [mark] * 5).load().summary
        assert f"--data.source.missing {mark}" in said["numbers that may mean a missing value"]
    for good in (["0", "0.5", "10"] * 20, ["-1", "0", "-7"] * 20, ["97", "98", "99"] * 20):  # negative controls
        assert not {"numbers with leading zeros", "numbers that may mean a missing value"} & table(
            tmp_path, good).load().summary.keys()


def test_categories_that_look_alike_are_said(tmp_path):
    data = table(tmp_path, [("Yes", "yes", "no")[i % 3] for i in range(N)]).load()
    assert data.summary["categories that look alike"] == "'Yes', 'yes'"
    assert "categories that look alike" not in table(tmp_path, ["yes", "no"] * 30).load().summary
