"""Saves a run's tokenizer in its folder and loads it in another run, so that text gets the same ids."""

import hashlib
import json
from dataclasses import asdict, dataclass

from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.tokenizers import BPE, GPT2, Bytes, Chars, Fitted, Texts, Tokenizer, with_padding
from lab.data.word_tokenizer import Words
from lab.errors import UserError
from lab.files import user_path

FILE = "tokenizer.json"


def saved_form(tokenizer: Tokenizer, fitted: Fitted) -> str:
    """The JSON that `Saved` reads: the tokenizer's class, fields and state, and whether its ids are shifted."""
    if isinstance(tokenizer, Saved):
        return fitted.state
    return json.dumps({"kind": type(tokenizer).__name__, "fields": asdict(tokenizer), "state": fitted.state,
                       "padding": fitted.pads, "size": fitted.size})


@dataclass(frozen=True)
class Saved:
    """The tokenizer of an earlier run on text. Fine-tuning needs it, so that text gets the same ids."""

    path: str
    """The run's folder, or the tokenizer.json in it."""

    def _content(self) -> str:
        where = user_path(self.path)
        where = where / FILE if where.is_dir() else where
        try:
            return where.read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            raise UserError(f"Saved finds no readable {where}: give the folder of a run on text.") from None

    @property
    def vocab_size_hint(self) -> int | None:
        try:
            return self.restore(self._content()).size
        except UserError:  # `identity` raises it
            return None

    def validate(self) -> None:
        """UserError without a path."""
        if not self.path.strip():
            raise UserError("Saved needs the folder of a run, such as Saved(\"runs/bert_base-0123456789ab\").")

    def identity(self) -> str:
        """Hash of the content; UserError if there is none."""
        return "saved " + hashlib.sha256(self._content().encode()).hexdigest()

    def fit(self, texts: Texts, size: int) -> Fitted:
        """Reads the file and ignores the text; UserError if it is missing or not a tokenizer."""
        return self.restore(self._content())

    def restore(self, state: str) -> Fitted:
        """`state`: the content of the file."""
        return revived(state, self.path)


def revived(state: str, where: str) -> Fitted:
    """Loads the result of `saved_form`. UserError, naming `where`, for anything else."""
    kinds = {cls.__name__: cls for cls in (Bytes, Chars, BPE, GPT2, Words, HuggingFaceTokenizer)}
    try:
        found = json.loads(state)
        fitted = kinds[found["kind"]](**found["fields"]).restore(found["state"])
        fitted = with_padding(fitted) if found["padding"] else fitted
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} holds no tokenizer that a run of this project wrote.") from None
    fitted.state = state
    return fitted
