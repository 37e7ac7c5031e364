"""What a file that is not UTF-8 may be: compressed, binary, or text in another encoding, with a sample of it."""

import codecs
import re
import unicodedata

# First bytes -> what it is, and the remedy.
_FORMATS = {
    b"\x1f\x8b": "gzip: give it a name that ends in .gz",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet or document: save it as CSV (UTF-8)",
    b"BZh": "bzip2: unpack it", b"\xfd7zXZ": "xz: unpack it", b"\x28\xb5\x2f\xfd": "zstd: unpack it",
    b"7z\xbc\xaf": "7-Zip: unpack it", b"PAR1": "Parquet: convert it to CSV", b"%PDF": "a PDF: extract its text",
    b"SQLite format": "an SQLite database: export it", b"\x89HDF": "HDF5: convert it", b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"ARROW1": "Arrow: convert it to CSV",
}
# Encoding of two bytes a character -> lead bytes of its common characters: kana, and those of the first level. The
# narrower range comes first: a text within it would be a coincidence in the wider ones.
_COMMON = {
    "euc_kr": ((0xA1, 0xA1), (0xA3, 0xA3), (0xB0, 0xC8)),
    "euc_jp": ((0xA1, 0xA1), (0xA3, 0xA5), (0xB0, 0xCF)),
    "shift_jis": ((0x81, 0x83), (0x88, 0x97)),
    "big5": ((0xA1, 0xA1), (0xA4, 0xC6)),
    "gbk": ((0xA1, 0xA1), (0xA3, 0xA3), (0xB0, 0xD7)),
}
_SINGLE = ("cp1252", "cp1250", "cp1251", "koi8-r", "mac-roman", "cp850", "cp866")
_SIGNS = set("\u2018\u2019\u201c\u201d\u201e\u2013\u2014\u2026\u20ac\u00a3\u00a7\u00b0\u00b2\u00b3\u00b5"
             "\u00ab\u00bb\u00bf\u00a1\u00b7\u00a9\u00ae\u2122\u2116\u00bd\u00bc\u00be\u00b1\u00d7\u00a0\u2022")
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
_WORD = re.compile(r"[^\W\d_]+")
LIKELY = 0.8  # of the characters beyond ASCII must be common ones


def format_of(block: bytes) -> str | None:
    """What a file that begins so is, if it is no text."""
    return next((what for sign, what in _FORMATS.items() if block.startswith(sign)), None)


def encodings_of(block: bytes) -> list[tuple[str, str]]:
    """(encoding, a word read with it), the likeliest first; "utf-8" if only few bytes are not."""
    if 0 in block:
        found = {name: text for name in _WIDE if (text := _decode(block, name)) and _printable(text)}
        return [(name, "") for name in sorted(found, key=lambda name: -sum(c < "\x7f" for c in found[name]))[:1]]
    text = block.decode(errors="replace")
    if sum(c > "\x7f" for c in text) > 5 * text.count("\ufffd"):
        return [("utf-8", "")]
    scores = {name: _two_bytes(block, name) for name in _COMMON} | {name: _one_byte(block, name) for name in _SINGLE}
    good = sorted((name for name, score in scores.items() if score >= LIKELY), key=lambda name: -round(scores[name], 2))
    return [(name, _sample(_decode(block, name))) for name in good[:4]]


def _decode(block: bytes, name: str) -> str:
    """The text, without a character that is cut at the end; "" if it is not in this encoding."""
    try:
        return codecs.getincrementaldecoder(name)().decode(block)
    except UnicodeError:
        return ""


def _printable(text: str) -> bool:
    return sum(c.isprintable() or c in "\r\n\t\ufeff" for c in text) > 0.95 * len(text)


def _two_bytes(block: bytes, name: str) -> float:
    """The share of common characters among those beyond ASCII."""
    found = [raw for c in _decode(block, name) if c > "\x7f" and (raw := c.encode(name, "replace"))]
    good = [any(low <= raw[0] <= high for low, high in _COMMON[name]) and len(raw) == 2 for raw in found]
    return sum(good) / max(len(good), 1)


def _one_byte(block: bytes, name: str) -> float:
    """The share of usual signs, and of letters in words of one script, in small letters or with a capital first, among
    the characters beyond ASCII. A quarter of a word in Latin letters is ASCII.
    """
    text = _decode(block, name)
    good = sum(c in _SIGNS for c in text)
    for word in _WORD.findall(text):
        beyond = sum(c > "\x7f" for c in word)
        scripts = {unicodedata.name(c, "?").split()[0] for c in word} if beyond else set()
        cased = word.islower() or word[1:].islower() and word[:1].isupper() or word.isupper()
        if len(scripts) == 1 and cased and (scripts == {"CYRILLIC"} and len(word) > 1 or
                                            scripts == {"LATIN"} and (4 * beyond <= 3 * len(word) or len(word) == 1)):
            good += beyond
    return good / max(sum(c > "\x7f" for c in text), 1)


def _sample(text: str) -> str:
    """The first word beyond ASCII."""
    return next((word[:12] for word in _WORD.findall(text) if not word.isascii()), "")
