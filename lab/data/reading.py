"""Reads text files of any encoding in blocks, and splits lines as editors and `wc -l` count them."""

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lab.data.encodings import encodings_of, format_of
from lab.errors import UserError

BLOCK = 1 << 20  # bytes read at once
# Byte order marks. UTF-32 comes first, because its little-endian mark starts with UTF-16's.
MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
         (codecs.BOM_UTF16_BE, "UTF-16"))
LINE_ENDS = re.compile(r"\r\n|\n|\r")


def lines_of(text: str) -> list[str]:
    r"""The lines of a text; only \n, \r\n and \r end a line.

    `str.splitlines` also splits at form feeds, U+2028, U+0085 and more, which may occur within a line.
    """
    found = LINE_ENDS.split(text)
    return found if found[-1] else found[:-1]


def check_encoding(name: str) -> None:
    """UserError if `name` is not a text encoding."""
    try:
        "a".encode(name)
    except (LookupError, ValueError):
        raise UserError(f"encoding={name!r} is unknown: write utf-8, utf-16, cp1252 or latin-1, for example.") from None


def encoding_of(path: Path, encoding: str = "UTF-8") -> str:
    """`encoding`; but UTF-16 or UTF-32 if `encoding` is UTF-8 and the file starts with their byte order mark."""
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
        return encoding
    try:
        with _opened(path) as file:
            begin = file.read(4)
    except (OSError, EOFError, zlib.error):  # `read_text` raises it
        return encoding
    return next((name for mark, name in MARKS if begin.startswith(mark)), encoding)


def read_text(path: Path, encoding: str = "UTF-8") -> Iterator[str]:
    """The text of one file (gzip if named .gz) in blocks, with unchanged line ends; see `encoding_of`.

    Raises:
      UserError: unreadable, or not text in this encoding; the message suggests another.
    """
    chosen = encoding_of(path, encoding)
    chosen = "UTF-8" if chosen == "utf-8" else chosen
    decoder = codecs.getincrementaldecoder(chosen)()
    wide = codecs.lookup(chosen).name.startswith(("utf-16", "utf-32"))  # half of the bytes are zeros
    done = pending = 0
    block = b""
    try:
        with _opened(path) as file:
            while True:
                block = file.read(BLOCK)
                pending = len(decoder.getstate()[0])
                if not done and not wide and block.count(0) * 10 > len(block):
                    raise UserError(f"{path} is not {chosen} text: every tenth byte or more is 0.{_advice(block)}")
                text = decoder.decode(block, final=not block)
                done += len(block)
                if text:
                    yield text
                if not block:
                    return
    except UnicodeError as error:
        at = done - pending + getattr(error, "start", 0)
        raise UserError(f"{path} is not {chosen} text: byte {at} is not valid.{_advice(block)}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): copy or compress it again.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None


def _opened(path: Path) -> IO[bytes]:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a pipe or a device, which may have no end or be read once: write it to a file.")
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _advice(block: bytes) -> str:
    """What the file may be, and what to do."""
    if what := format_of(block):
        return f" It is {what}."
    if any(block.startswith(mark) for mark, _ in MARKS):
        found = [("utf-16", "")]
    else:
        found = encodings_of(block)
    if not found and 0 in block:
        return " It looks like a binary file."
    if not found:
        return (" Set encoding (--data.source.encoding) to what it is, cp1252 or latin-1 for example, or convert it "
                "with `iconv -f CP1252 -t UTF-8`.")
    (likely, sample), *others = found
    if likely == "utf-8":
        return " Nearly all of it is: correct that place. (Read with another encoding, the rest would be wrong.)"
    also = " or ".join(f"{name} ({word!r})" for name, word in others)
    return (f" It looks like {likely}{f' ({sample!r})' if sample else ''}: set encoding={likely!r} "
            f"(--data.source.encoding {likely}), or convert it with `iconv -f {likely.upper()} -t UTF-8`."
            f"{f' It may be {also}, too.' if also else ''}")
