"""GPT-2's alphabet of bytes and its list of merges, from a folder or from Hugging Face."""

import hashlib
import json
from pathlib import Path

from lab.data.network import in_time
from lab.errors import Absent, UserError
from lab.files import user_path

FILE = "openai-community/gpt2", "merges.txt"
URL = "https://huggingface.co/openai-community/gpt2/resolve/main/merges.txt"
SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # also of OpenAI's vocab.bpe
SECONDS = 20.0  # for the download


def alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte value, in GPT-2's order of ids: character -> byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def merges_file(folder: str) -> Path:
    """The file of a folder that has the list. UserError if there is none."""
    where = user_path(folder)
    for name in ("vocab.bpe", "merges.txt", "tokenizer.json"):
        if (where / name).is_file():
            return where / name
    raise UserError(f"GPT2(folder={folder!r}) finds no merges.txt, vocab.bpe or tokenizer.json in {where.absolute()}.")


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of tokens to merge, in order. UserError for a file that is no such list."""
    known = set(alphabet())
    try:
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text)["model"]["merges"] if path.suffix == ".json" else text.split("\n")
        # The first line is "#version: ..."; a later "#" is a token.
        lines = [line for i, line in enumerate(lines) if line and not (i == 0 and "#version" in line)]
        merges = [(left, right) for left, right in (x.split() if isinstance(x, str) else x for x in lines)]
        for left, right in merges:
            if not {left, right} <= known:
                raise ValueError(f"{left!r} or {right!r} is not yet a token")
            known.add(left + right)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a list of byte-level BPE merges (one pair a line, UTF-8).") from None
    return merges


def downloaded() -> Path:
    """The list in Hugging Face's cache. UserError within `SECONDS` if it is not there and cannot be fetched."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    def download() -> str:
        get_hf_file_metadata(hf_hub_url(*FILE))  # without a network fails at once; the next line tries for 24 s
        return hf_hub_download(*FILE)

    elsewhere = f"run `curl -LO {URL}` where there is a network, and give the folder with --data.tokenizer.folder"
    try:
        path = Path(hf_hub_download(*FILE, local_files_only=True))
    except FileNotFoundError:
        try:
            path = Path(in_time(download, SECONDS))
        except Exception as error:  # of the network, the server or the disk
            reason = f"no answer in {SECONDS:.0f} s" if isinstance(error, TimeoutError) else type(error).__name__
            raise Absent(f"GPT-2's vocabulary is not on this machine and cannot be downloaded ({reason}): {elsewhere}, "
                         f"or use BPE().") from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{path} is not GPT-2's (wrong checksum): delete it to download it again, or {elsewhere}.")
    return path
