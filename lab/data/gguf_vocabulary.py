"""The vocabulary of a .gguf file as a tokenizer of the `tokenizers` library."""

from collections.abc import Mapping, Sequence
from typing import Any

from lab.errors import UserError

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

# How the text is split before the merges apply, by tokenizer.ggml.pre: the rule in the tokenizer.json of the models
# that the name stands for.
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA_3 = rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}"
QWEN_2 = rf"{_WORD}|\p{{N}}|{_REST}"
GPT_2 = ("gpt-2",)  # "default" and none are split otherwise by llama.cpp
PRE = (*GPT_2, "smollm", "llama-bpe", "llama3", "llama-v3", "qwen2")


def from_gguf(metadata: Mapping[str, Any], title: str) -> tuple[str, dict[str, str]]:
    """(tokenizer.json, special tokens and chat_template) of a file's metadata.

    Raises:
      UserError: no vocabulary, or one of a kind that is not known here.
    """
    from tokenizers import AddedToken

    own = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()
           if name.startswith("tokenizer.ggml.")}
    tokens, kinds = own.get("tokens"), own.get("token_type") or ()
    if not tokens:
        raise UserError(f"{title} has no vocabulary.")
    make = {"gpt2": _byte_level, "llama": _sentence_piece}.get(own.get("model"))
    if make is None:
        raise UserError(f"{title} has a vocabulary of the kind {own.get('model')!r}; gpt2 and llama can be read.")
    try:
        tokenizer = make(own, tokens, title)
        named = {name: tokens[own[field]] for name, field in (
            ("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id")) if field in own}
        control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == CONTROL]
        known = tokenizer.get_vocab()
        tokenizer.add_special_tokens([AddedToken(x, normalized=False) for x in control if x in known])
        tokenizer.add_tokens([AddedToken(x, normalized=False) for x, kind in zip(tokens, kinds, strict=False)
                              if kind == USER_DEFINED and x in known])
    except UserError:
        raise
    except Exception as e:  # the library raises no other class; ids outside the list
        raise UserError(f"{title}: its vocabulary is damaged ({(str(e).splitlines() or [''])[0][:120]}).") from None
    _add_ends(tokenizer, own, named)
    template = metadata.get("tokenizer.chat_template")
    return tokenizer.to_str(), named | ({"chat_template": template} if template else {})


def _byte_level(own: Mapping[str, Any], tokens: Sequence[str], title: str) -> Any:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if (pre := own.get("pre", "")) not in PRE:
        raise UserError(f"{title}: the vocabulary's rule for splitting text, tokenizer.ggml.pre, is {pre!r}; known are "
                        f"{', '.join(filter(None, PRE))}. Use the tokenizer.json of the model.")
    vocab = {token: i for i, token in enumerate(tokens)}
    llama = pre.startswith("llama")
    # Llama 3 takes a word that is a token as it is, even where the merges do not lead to it.
    tokenizer = Tokenizer(models.BPE(vocab, [_pair(merge) for merge in own["merges"]], ignore_merges=llama))
    tokenizer.decoder = decoders.ByteLevel()
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in GPT_2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "smollm":  # each digit alone, then GPT-2's rule
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        split = pre_tokenizers.Split(Regex(LLAMA_3 if llama else QWEN_2), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _sentence_piece(own: Mapping[str, Any], tokens: Sequence[str], title: str) -> Any:
    """SentencePiece's BPE of Llama 1 and 2 and Mistral: the pair whose union has the best score is merged first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, own["scores"], strict=True))
    pairs = [(score, len(token[:i]), token[:i], token[i:]) for token, score in scores.items()
             for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
    pairs.sort(key=lambda pair: (-pair[0], -pair[1]))
    tokenizer = Tokenizer(models.BPE(vocab, [pair[2:] for pair in pairs], fuse_unk=True, byte_fallback=True,
                                     unk_token=tokens[own["unknown_token_id"]] if "unknown_token_id" in own else None))
    prefix = own.get("add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first" if prefix else "never", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


def _add_ends(tokenizer: Any, own: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """The tokens that the file says to add in front of a text and behind it."""
    from tokenizers import processors

    sides = {"bos": own.get("add_bos_token", own["model"] == "llama"), "eos": own.get("add_eos_token", False)}
    ends = {side: token for side, adds in sides.items() if adds and (token := named.get(f"{side}_token"))}
    if ends:
        def around(text: str, segment: int) -> str:
            first, last = (f"{ends[side]}:{segment}" if side in ends else "" for side in ("bos", "eos"))
            return " ".join(filter(None, [first, f"{text}:{segment}", last]))

        tokenizer.post_processor = processors.TemplateProcessing(
            single=around("$A", 0), pair=f"{around('$A', 0)} {around('$B', 1)}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in set(ends.values())])
