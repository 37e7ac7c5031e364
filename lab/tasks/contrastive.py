"""Contrastive learning of pairs (CLIP, Radford et al. 2021), and what an image is by the captions of classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError, forgiving
from lab.files import replace_file
from lab.tasks import reports
from lab.tasks.base import EvalResult, Loss, Task, apply
from lab.tasks.supervised import Classify

HIDDEN = -1e9  # a logit of which nothing is left after softmax; finite, also where all are hidden
PROBED = 60_000  # training images for the linear probe, at most


@dataclass(frozen=True)
class Contrastive(Task):
    """Pairs of image and text: which of the batch's texts belongs to an image, and which image to a text? The loss of a
    pair is the mean of both cross-entropies, in nats; all other pairs of the global batch are its negatives, on
    however many devices (Radford et al. 2021, figure 3). Padding, of weight 0, is not used as a negative.

    So the loss depends on the batch: it is log(batch) for random embeddings, and where captions repeat it cannot reach
    0 (64 pairs of 10 classes: about log 6.4 = 1.9). Evaluation has the negatives of its own batches.

    Metrics: loss, temperature (1 / scale) and, in evaluation, accuracy: zero-shot, each image has the class with the
    nearest captions. Embeddings of a class's captions in all templates are averaged (prompt ensembling, section 3.1.4).
    The report sets it beside a linear probe: logistic regression (scikit-learn) on the standardised embeddings of
    training images, at most 60,000 evenly spaced ones. Both, and chance, are in zero_shot.json.
    """

    curves: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "temperature")
    whole_batch: ClassVar[bool] = True

    def filled(self, experiment: Any) -> Any:
        """Sets the names of classes that the data takes from its source, and the text encoder's vocabulary."""
        data, model = experiment.data, experiment.model
        data = data.named() if hasattr(data, "named") else data
        text = getattr(model, "text", None)
        if getattr(text, "vocab", 0) is None:
            model = model.clone(text=text.clone(vocab=data.metadata().get("vocab")))
        return replace(experiment, data=data, model=model)

    def init(self, model: nn.Module, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Variables for `batch`. Raises UserError if images have no captions."""
        if not {"inputs", "text"} <= batch.keys():
            raise UserError("Contrastive needs images with captions: data=CaptionedImages(...), of lab.data.images.")
        return model.init(key, batch["inputs"][:1], batch["text"][:1], train=False)

    def check(self, output: Any, data: Any) -> None:
        """Raises UserError for a model that does not embed pairs."""
        if not isinstance(output, Mapping) or not {"image", "text", "scale"} <= output.keys():
            raise UserError('Contrastive needs a model whose output has "image", "text" and "scale": '
                            'CLIP(image=ViT(...), text=BERT(...)), of lab.models.clip.')

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """`batch`: "inputs" (B, H, W, C), "text" int (B, L), "weight" (B,), 1 real, 0 padding; in evaluation also
        "targets" int (B,), the classes, and "prompts" int (C, T, L), the captions of each."""
        found, model_state = apply(model, variables, batch["inputs"], batch["text"], rngs=rngs, train=train)
        weight_B = batch["weight"].astype(jnp.float32)
        weight = weight_B.sum()
        total = (pair_losses(found["image"], found["text"], found["scale"], weight_B) * weight_B).sum()
        metrics = {"loss": (total, weight), "temperature": (weight / found["scale"], weight)}
        if not train and "prompts" in batch:
            right_B = jnp.argmax(_class_logits(model, variables, found, batch["prompts"]), -1) == batch["targets"]
            metrics["accuracy"] = (right_B * weight_B).sum(), weight
        return total, weight, metrics, model_state

    def predict(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
        """Zero-shot "probabilities" (B, C) and "prediction" int32 (B,), and the image's "embedding" (B, E)."""
        if "prompts" not in batch:
            raise UserError("Contrastive predicts classes by their captions, and this data has none.")
        found = apply(model, variables, batch["inputs"], rngs={}, train=False)[0]
        logits_BC = _class_logits(model, variables, found, batch["prompts"])
        return {"probabilities": jax.nn.softmax(logits_BC), "prediction": jnp.argmax(logits_BC, -1).astype(jnp.int32),
                "embedding": found["image"]}

    def columns(self, predictions: Mapping[str, np.ndarray], data: Any) -> dict[str, list[Any]]:
        """See `Classify.columns`."""
        return Classify().columns(predictions, data)

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """The report of a classifier, for zero-shot classes; and zero_shot.json. Returns lines to print."""
        targets = reports.read(outcome.records, "targets")["targets"]
        lines = Classify().report(outcome, targets, outcome.data.classes)
        found = {"split": outcome.split, "records": len(targets), "chance": 1 / len(outcome.data.classes),
                 "zero_shot": float(np.mean(outcome.predict()["prediction"] == targets))}
        with forgiving("The linear probe"):
            found |= linear_probe(outcome, targets)
        replace_file(outcome.folder / "zero_shot.json", json.dumps(found, indent=1) + "\n")
        probe = f", linear probe {found['linear_probe']:.4f}" if "linear_probe" in found else ""
        return [*lines, f"Accuracy: zero-shot {found['zero_shot']:.4f}{probe}, chance {found['chance']:.4f}"]


def pair_losses(image_BE: Array, text_BE: Array, scale: Array, weight_B: Array) -> Array:
    """The loss of each pair, (B,), from embeddings of length 1. Padding, of weight 0, is not used as a negative."""
    # Cosines times up to 100: a TPU's default precision would cost 0.4 nats. The compiler gathers the other devices'
    # texts.
    logits_BB = scale * jnp.einsum("BE,JE->BJ", image_BE, text_BE, precision=jax.lax.Precision.HIGHEST)
    real_B = weight_B > 0
    all_texts_B = jax.nn.logsumexp(jnp.where(real_B, logits_BB, HIDDEN), axis=1)
    all_images_B = jax.nn.logsumexp(jnp.where(real_B[:, None], logits_BB, HIDDEN), axis=0)
    return (all_texts_B + all_images_B) / 2 - scale * (image_BE * text_BE).sum(-1)


def _class_logits(model: nn.Module, variables: Mapping[str, Any], found: Mapping[str, Array],
                  prompts_CTL: Array) -> Array:
    """Logits (B, C) of the images in `found`, an output of the model, from the mean of each class's captions."""
    C, T, L = prompts_CTL.shape
    text_CTE = model.apply(variables, None, prompts_CTL.reshape(C * T, L), train=False)["text"].reshape(C, T, -1)
    class_CE = text_CTE.mean(1)
    class_CE /= jnp.maximum(jnp.linalg.norm(class_CE, axis=-1, keepdims=True), 1e-12)
    return found["scale"] * jnp.einsum("BE,CE->BC", found["image"], class_CE, precision=jax.lax.Precision.HIGHEST)


def linear_probe(outcome: EvalResult, targets: np.ndarray) -> dict[str, float | int]:
    """Accuracy of logistic regression on the embeddings of training images, for the evaluated ones, whose classes are
    `targets`; and the number of training images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = len(outcome.data.train)
    chosen = np.unique(np.linspace(0, n - 1, min(PROBED, n)).astype(np.int64))
    some = outcome.data.some("train", chosen)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(outcome.predict(some)["embedding"], reports.read(some, "targets")["targets"])
    return {"linear_probe": float(probe.score(outcome.predict()["embedding"], targets)), "probe_records": len(chosen)}
