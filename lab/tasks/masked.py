"""Masked language modelling: predict hidden tokens from their context on both sides."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError
from lab.files import make_folder, replace_file
from lab.tasks.base import EvalResult, Loss, Task, apply
from lab.tasks.cross_entropy import cross_entropy

HIDDEN, RANDOM = 0.8, 0.1  # shares of the chosen tokens that become [MASK] and a random token; the rest stay
MASK = "[MASK]"


@dataclass(frozen=True)
class MaskedLM(Task):
    """Masked language modelling (Devlin et al. 2019): cross-entropy in nats per hidden token.

    A share `rate` of a text's real tokens is chosen, rounded up to at least one: 80 % become [MASK], 10 % a random
    token, 10 % stay. [MASK] is the model's `mask_id`, or the last id of its vocabulary, which is then at least one
    larger than the tokenizer's. Random tokens are uniform over all other ids except 0 (padding). The choice depends
    only on the record's key: (seed, step, record) in training, (seed, record) in evaluation.

    Batches: "inputs" int (B, L), "mask" (B, L), 1 where a token is real, and optionally "segments" (B, L); or language
    model windows, "tokens" int (B, L+1), without their last token. Metrics: loss, accuracy, masked_share (chosen
    tokens / real tokens), and perplexity of the hidden tokens.
    """

    rate: float = 0.15
    """Share of the real tokens to predict."""
    samples: int = 8
    """Number of examples to write to samples/masked.txt when a run ends."""

    curves: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    fields: ClassVar[tuple[str, ...]] = ("inputs", "tokens")

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if not 0 < self.rate <= 1:
            raise UserError(f"--task.rate must be above 0 and at most 1, not {self.rate}.")
        if self.samples < 0:
            raise UserError(f"--task.samples must be 0 or more, not {self.samples}.")

    def init(self, model: nn.Module, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Variables for `batch`. Raises UserError if the model has no masked-LM head."""
        if getattr(model, "classes", 0) is not None:
            raise UserError(f"MaskedLM needs a model with a masked-LM head, BERT(classes=None); this "
                            f"{type(model).__name__} has none.")
        tokens_BL, fields = _texts(batch)
        return model.init(key, tokens_BL[:1], train=False, **{name: value[:1] for name, value in fields.items()})

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """Cross-entropy at the chosen positions; logits at other positions are not computed."""
        (tokens_BL, fields), (inputs_BL, chosen_BM, weight_BM) = _texts(batch), self.hidden(model, batch)
        logits_BMV, model_state = apply(model, variables, inputs_BL, rngs=rngs, train=train, select=chosen_BM, **fields)
        targets_BM = jnp.take_along_axis(tokens_BL, chosen_BM, axis=1)
        nll_BM, _, right_BM = cross_entropy(logits_BMV, targets_BM)
        weight, nll = weight_BM.sum(), (nll_BM * weight_BM).sum()
        real = (_real(tokens_BL, fields).sum(axis=1) * batch["weight"]).sum()
        metrics = {"loss": (nll, weight), "accuracy": ((right_BM * weight_BM).sum(), weight),
                   "masked_share": (weight, real)}
        return nll, weight, metrics, model_state

    def hidden(self, model: nn.Module, batch: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        """`hide` for a batch; weights are 0 for padding."""
        tokens_BL, fields = _texts(batch)
        known = batch["vocab"][0] if "vocab" in batch else None
        inputs_BL, chosen_BM, weight_BM = self.hide(tokens_BL, _real(tokens_BL, fields), batch["key"], model.vocab,
                                                    known, mask_id(model))
        return inputs_BL, chosen_BM, weight_BM * batch["weight"][:, None]

    def hide(self, tokens_BL: Array, real_BL: Array, keys_B: Array, vocab: int,
             known: Array | None = None, mask_id: int | None = None) -> tuple[Array, Array, Array]:
        """Chooses and hides tokens, each record with its own key. `vocab`: the model's; `known`: the tokenizer's number
        of ids. Ids between `known` and the last only pad the vocabulary and are never drawn. `mask_id` None: the last
        id is [MASK].

        Returns:
          Inputs (B, L); chosen positions int (B, M), M = rate * L rounded up; and their weights float32 (B, M), 0 for
          surplus positions of records with fewer than L real tokens.
        """
        count_L = _rounded_up(self.rate, tokens_BL.shape[1])
        hidden = vocab - 1 if mask_id is None else mask_id
        most = vocab - 1 if known is None else jnp.minimum(known, vocab - 1)

        def one(tokens_L: Array, real_L: Array, key: Array) -> tuple[Array, Array, Array]:
            key = jax.random.fold_in(key, zlib.crc32(b"masked"))  # the data's transforms draw from the same key
            order, kind, other = (jax.random.fold_in(key, i) for i in range(3))
            scores_L = jnp.where(real_L > 0, jax.random.uniform(order, tokens_L.shape), -1.0)
            _, chosen_M = jax.lax.top_k(scores_L, int(count_L[-1]))
            count = jnp.asarray(count_L)[(real_L > 0).sum()]
            old_M, kind_M = tokens_L[chosen_M], jax.random.uniform(kind, chosen_M.shape)
            new_M = jnp.where(kind_M < HIDDEN + RANDOM, jax.random.randint(other, chosen_M.shape, 1, most), old_M)
            new_M = jnp.where(kind_M < HIDDEN, hidden, new_M).astype(tokens_L.dtype)
            weight_M = jnp.arange(chosen_M.shape[0]) < count
            return tokens_L.at[chosen_M].set(jnp.where(weight_M, new_M, old_M)), chosen_M, weight_M.astype(jnp.float32)

        return jax.vmap(one)(tokens_BL, real_BL, keys_B)

    def summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Perplexity: exp of the mean cross-entropy."""
        return {"perplexity": float(np.exp(means["loss"]))}

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """Writes samples/masked.txt: texts, the masked inputs, and the model's predictions."""
        if not self.samples or not hasattr(outcome.data, "decode"):
            return []
        chosen = np.unique(np.linspace(0, len(outcome.records) - 1, self.samples).astype(int))
        records = outcome.records[chosen]
        tokens_BL, fields = _texts(records)
        real_BL = fields.get("mask", np.ones_like(tokens_BL))
        found = outcome.compute(_guesses, tokens_BL, real_BL, chosen, fields, np.uint32(outcome.seed), task=self)
        rows = zip(tokens_BL, real_BL > 0, *found, strict=True)
        path = outcome.folder / "samples" / "masked.txt"
        make_folder(path.parent)
        replace_file(path, "\n".join(_example(outcome.data.decode, mask_id(outcome.model), *row) for row in rows))
        return [f"Texts with hidden tokens and what the model guessed: {path}"]


def mask_id(model: Any) -> int:
    """The id of [MASK]: the model's `mask_id`, or the last of its vocabulary."""
    own = getattr(model, "mask_id", None)
    return model.vocab - 1 if own is None else own


def _guesses(model: nn.Module, variables: Mapping[str, Any], tokens_BL: Array, real_BL: Array, records_B: Array,
             fields: Mapping[str, Array], seed: Array, *, task: MaskedLM) -> tuple[Array, Array, Array, Array]:
    """The result of `hide` for some records, and the most likely tokens (B, M) at the chosen positions."""
    keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(records_B)
    inputs_BL, chosen_BM, weight_BM = task.hide(tokens_BL, real_BL, keys_B, model.vocab, mask_id=mask_id(model))
    logits_BMV, _ = apply(model, variables, inputs_BL, rngs={}, train=False, select=chosen_BM, **fields)
    return inputs_BL, chosen_BM, weight_BM, logits_BMV.argmax(-1)


def _example(decode: Callable[[np.ndarray], str], mask_id: int, tokens_L: np.ndarray, real_L: np.ndarray,
             inputs_L: np.ndarray, chosen_M: np.ndarray, weight_M: np.ndarray, guesses_M: np.ndarray) -> str:
    """One text in its original form, as masked input, and with the model's predictions."""
    chosen, guesses, filled_L = chosen_M[weight_M > 0], guesses_M[weight_M > 0], inputs_L.copy()
    filled_L[chosen] = guesses
    shown = {"original": tokens_L, "masked": inputs_L,
             f"predicted ({(guesses == tokens_L[chosen]).sum()} of {len(chosen)} right)": filled_L}
    return "".join(f"--- {title}\n{_decoded(decode, ids[real_L], mask_id)}\n" for title, ids in shown.items())


def _texts(batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Token ids (B, L) and the model's other arguments, for either kind of batch."""
    if "tokens" in batch:
        return batch["tokens"][:, :-1], {}
    return batch["inputs"], {name: batch[name] for name in ("mask", "segments") if name in batch}


def _real(tokens_BL: Any, fields: Mapping[str, Any]) -> Any:
    """1 where a token is real."""
    return fields["mask"] if "mask" in fields else jnp.ones_like(tokens_BL)


def _rounded_up(rate: float, length: int) -> np.ndarray:
    """ceil(rate * n) for n = 0 ... `length`. 0.07 * 100 is 7.000000000000001, and must not become 8."""
    count = np.arange(length + 1)
    return np.maximum(np.ceil(np.round(rate * count, 6)), count > 0).astype(np.int32)


def _decoded(decode: Callable[[np.ndarray], str], ids: np.ndarray, mask_id: int) -> str:
    """The text of `ids`. Decodes whole runs between masks, since a single token may be part of a character."""
    runs = [run[run != mask_id] for run in np.split(ids, np.flatnonzero(ids == mask_id))]
    texts = [text for run in runs for text in (MASK, decode(run) if len(run) else "")][1:]
    two = ids[ids != mask_id][:2]
    words = len(two) == 2 and decode(two) == f"{decode(two[:1])} {decode(two[1:])}"  # a word tokenizer
    return " ".join(filter(None, texts)) if words else "".join(texts)
