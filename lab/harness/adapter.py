"""Our language model as lm-eval sees one. The only file besides tasks.py that needs the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lab.errors import UserError
from lab.harness.generation import continue_greedily
from lab.harness.scoring import Language, score

Pair = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):
    """Answers the three kinds of requests as lm-eval's own backend for transformers does, in float32 or the run's type.

    Contexts that are too long lose their beginning. Only greedy generation: a task that samples is refused.
    """

    def __init__(self, language: Language):
        super().__init__()
        self.language = language
        self._prefix = prefix_token(language.text)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token; for a tokenizer without one, the token that begins every text."""
        return self._prefix if self.language.text.eot is None else self.language.text.eot

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text whose first token is scored."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model sees."""
        return self.language.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; `add_special_tokens=False` leaves out those that the tokenizer adds by itself."""
        text = self.language.text
        if add_special_tokens is False and hasattr(text, "encode_plain"):
            return text.encode_plain(string).tolist()
        return text.encode(string).tolist()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation after the context in nats, whether it is the greedy one)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[-(self.max_length + 1):] for _, context, continuation in requests]
        found = []
        for (logs, greedy), (_, _, continuation) in zip(score(self.language, rows), requests, strict=True):
            last = slice(len(logs) - len(continuation), None) if len(continuation) <= len(logs) else slice(None)
            found.append((float(logs[last].sum(dtype=np.float64)), bool(greedy[last].all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: windows of the context's length, each token scored once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for context, continuation in map(make_disjoint_window, get_rolling_token_windows(
                    token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)):
                windows.append((None, context, continuation))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += value
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, without the stop text. UserError for a task that samples."""
        text, found = self.language.text, [""] * len(requests)
        end = None if text.eot is None else text.decode([text.eot])
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for places in kinds.values():
            how = normalize_gen_kwargs(dict(requests[places[0]].args[1]), 256)
            until, tokens = handle_stop_sequences(how.get("until"), eos=end), how["max_gen_toks"]
            self._check(how, tokens)

            def ended(ids: list[int], until: Sequence[str] = until) -> bool:
                return any(stop and stop in self._text(ids) for stop in until)

            prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in places]
            for i, ids in zip(places, continue_greedily(self.language, prompts, tokens, ended), strict=True):
                found[i] = postprocess_generated_text(self._text(ids), until, None)
        return found

    def _check(self, how: Mapping[str, Any], tokens: int) -> None:
        if how.get("do_sample") or how.get("temperature"):
            raise UserError("A task asks for sampled text (do_sample): here texts are generated greedily.")
        if tokens >= self.max_length:
            raise UserError(f"A task asks for {tokens} new tokens, and the model's context has {self.max_length}: it "
                            f"leaves no room for a question.")

    def _text(self, ids: Sequence[int]) -> str:
        """The text of the ids without special tokens, which stand for no bytes."""
        text = self.language.text
        return text.decode([i for i in ids if text.byte_counts[i]])


def prefix_token(text: Any) -> int:
    """The token before every text: the tokenizer's begin of a text, else its end of text, a line end or id 0."""
    begin = getattr(text, "begin", None)
    if begin is not None:
        return begin
    if text.eot is not None:
        return text.eot
    try:
        return int(text.encode("\n")[0])
    except (UserError, IndexError):  # a vocabulary of characters without it
        return 0
