"""Generative adversarial training (Goodfellow et al. 2014) with one scalar loss, sample grids, and judge scores."""

from __future__ import annotations

import functools
import io
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image, ImageDraw

from lab.errors import UserError
from lab.files import make_folder, replace_file
from lab.tasks.base import EvalResult, Loss, Task, apply

GRID = 8  # rows and columns of a sample grid
GAP = 2  # pixels between the pictures of a grid
LATENT = zlib.crc32(b"latent")  # folded into a record's key, which augmentation also uses
CONFIDENT = 0.9  # minimum probability at which the judge counts a sample as recognised


def latents(keys_B: Array, latent: int) -> Array:
    """One standard normal vector per key: float32 (B, latent). Row i depends on key i only."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, LATENT), (latent,)))(keys_B)


@dataclass(frozen=True)
class Adversarial(Task):
    """Generator and discriminator trained at the same time, by the gradient of ONE scalar.

    For logits D, images x, fakes y = G(z) and stop-gradient sg, a record's loss is

        d(D(x), D(sg(y))) + g(D_sg(y)),

    where D_sg is D with sg on its parameters. d has no gradient for G's parameters and g none for D's, so the gradient
    equals that of two separate losses, both at the parameters before the step. The model needs `latent`, the methods
    `generate` and `discriminate`, and the discriminator's parameters under "discriminator". Images are in [-1, 1]. One
    z is drawn per record, from the record's key.

    Metrics: loss (sum of both), generator_loss, discriminator_loss, and the discriminator's accuracy on real and on
    fake images. None of them measures sample quality: a low loss of one network is a high loss of the other.
    """

    curves: ClassVar[tuple[str, ...]] = ("generator_loss", "discriminator_loss", "real_accuracy", "fake_accuracy")

    kind: Literal["non_saturating", "hinge"] = "non_saturating"
    """non_saturating: d = softplus(-real) + softplus(fake), g = softplus(-fake) (Goodfellow et al. 2014); hinge:
    d = max(0, 1 - real) + max(0, 1 + fake), g = -fake (Lim & Ye 2017)."""
    label_smoothing: float = 0.0
    """Real images have target 1 - label_smoothing (one-sided, Salimans et al. 2016). non_saturating only."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if not isinstance(self.label_smoothing, int | float):  # traced by a study
            return
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"--task.label-smoothing must be in [0, 1), not {self.label_smoothing}.")
        if self.kind == "hinge" and self.label_smoothing:
            raise UserError("--task.label-smoothing is for --task.kind non_saturating: hinge has no target to smooth.")

    def losses(self, real_B: Array, fake_B: Array, fooled_B: Array) -> tuple[Array, Array]:
        """Losses of discriminator and generator, (B,) each. `fake_B` and `fooled_B`: D and D_sg of the fakes."""
        if self.kind == "hinge":
            return nn.relu(1 - real_B) + nn.relu(1 + fake_B), -fooled_B
        smooth = self.label_smoothing
        discriminator = (1 - smooth) * nn.softplus(-real_B) + smooth * nn.softplus(real_B) + nn.softplus(fake_B)
        return discriminator, nn.softplus(-fooled_B)

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """`batch`: "inputs" (B, H, W, C) in [-1, 1], "key" (B,), "weight" (B,). See the class for the loss."""
        images, weight = batch["inputs"], batch["weight"].astype(jnp.float32)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError("The images reach the task as integers: let the data normalise them (mean 0.5, standard "
                            "deviation 0.5, so that they are in [-1, 1] as the generator's are).")
        params = variables["params"]
        run = functools.partial(apply, model, rngs=rngs, train=train)
        fakes, model_state = run(variables, latents(batch["key"], model.latent), method="generate")
        real, model_state = run({"params": params, **model_state}, images, method="discriminate")
        fake, model_state = run({"params": params, **model_state}, jax.lax.stop_gradient(fakes), method="discriminate")
        # XLA merges this forward pass with the identical one above (CSE). Here only the images get a gradient.
        still = {**params, "discriminator": jax.lax.stop_gradient(params["discriminator"])}
        fooled, _ = run({"params": still, **model_state}, fakes, method="discriminate")
        discriminator, generator = self.losses(real, fake, fooled)

        def total(values_B: Array) -> tuple[Array, Array]:
            return (values_B * weight).sum(), weight.sum()

        metrics = {"loss": total(discriminator + generator), "generator_loss": total(generator),
                   "discriminator_loss": total(discriminator), "real_accuracy": total(real > 0),
                   "fake_accuracy": total(fake < 0)}
        return *metrics["loss"], metrics, model_state

    def snapshot(self, outcome: EvalResult) -> None:
        """Writes samples/step-<step>.png: 8 x 8 samples, comparable because the noise depends on the seed only."""
        path = outcome.folder / "samples" / f"step-{outcome.step:06d}.png"
        _save(path, grid(generate_images(outcome.compute, GRID * GRID, outcome.seed)))

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """Writes plots/samples.png, and plots/samples_over_time.png from the grids of this run's `snapshot`s."""
        plots = outcome.folder / "plots"
        _save(plots / "samples.png", grid(generate_images(outcome.compute, GRID * GRID, outcome.seed)))
        lines = [f"{GRID * GRID} samples: {plots / 'samples.png'}"]
        # Read the files, so that a resumed run has its earlier grids. Skip later steps, left by an abandoned run.
        found = {int(m[1]): path for path in (outcome.folder / "samples").glob("step-*.png")
                 if (m := re.fullmatch(r"step-(\d+)\.png", path.name)) and int(m[1]) <= outcome.step}
        if len(found) > 1:
            _save(plots / "samples_over_time.png", over_time(found))
            lines.append(f"The same noise at {len(found)} steps: {plots / 'samples_over_time.png'}")
        return lines


# --------------------------------------------------------------------------------------------------------- samples


def _generate(model: nn.Module, variables: Mapping[str, Any], seed: Array, first: Array, *, batch: int) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"samples"))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(batch))
    images, _ = apply(model, variables, latents(keys, model.latent), rngs={}, train=False, method="generate")
    return jnp.round((images.astype(jnp.float32) + 1) * 127.5).astype(jnp.uint8)


def generate_images(compute: Callable[..., Any], number: int, seed: int, batch: int = 64) -> np.ndarray:
    """`number` samples, uint8 (number, H, W, C); sample i depends on (variables, seed, i), not on the batch size.

    `compute`: see `EvalResult`.
    """
    parts = [compute(_generate, np.uint32(seed), np.uint32(first), batch=batch)
             for first in range(0, number, batch)]
    return np.concatenate(parts)[:number]


def grid(images: np.ndarray) -> Image.Image:
    """uint8 images (n, H, W, C), C 1 or 3, in rows of 8 on white; small images are magnified."""
    n, H, W, C = images.shape
    scale = max(1, 56 // H)
    rows = -(-n // GRID)
    sheet = np.full((rows * (H * scale + GAP) + GAP, GRID * (W * scale + GAP) + GAP, C), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (GAP + (i // GRID) * (H * scale + GAP), GAP + (i % GRID) * (W * scale + GAP))
        sheet[top: top + H * scale, left: left + W * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet[..., 0] if C == 1 else sheet)


def over_time(grids: Mapping[int, Path], rows: int = 12) -> Image.Image:
    """The first rows of at most `rows` evenly spaced grids (step -> file), stacked and labelled with the step."""
    steps = sorted(grids)
    steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(rows, len(steps))).round().astype(int))]
    strips = []
    for step in steps:
        with Image.open(grids[step]) as picture:
            strips.append(picture.convert("RGB").crop((0, 0, picture.width, (picture.height - GAP) // GRID)))
    margin, height = 60, strips[0].height
    sheet = Image.new("RGB", (margin + strips[0].width, len(strips) * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (step, strip) in enumerate(zip(steps, strips, strict=True)):
        sheet.paste(strip, (margin, i * height))
        draw.text((margin - 6, i * height + height // 2), f"{step:,}", fill="black", anchor="rm")
    return sheet


def _save(path: Path, picture: Image.Image) -> None:
    """Saves atomically, so that a killed run leaves no partial image."""
    make_folder(path.parent)
    picture.save(buffer := io.BytesIO(), format="PNG")
    replace_file(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------- scores


def judge_scores(probabilities: np.ndarray) -> dict[str, float]:
    """Scores of samples from the `probabilities` (n, C) of a classifier of real images; rows sum to 1.

    confident           share of the samples with a largest probability >= 0.9
    confidence          mean of the largest probability
    entropy             H = -sum_c h_c log h_c in nats, h_c is the share of samples with most likely class c
    normalised_entropy  H / log C: 1 when all classes are as frequent
    classes             number of classes with h_c >= 0.01
    collapsed           1 when normalised_entropy < 0.5 or classes < C / 2, else 0

    High confidence with low entropy means mode collapse, low confidence with high entropy means noise: read both (the
    Inception score, Salimans et al. 2016, multiplies them). Repeated samples within a class are not detected.

    Raises:
      UserError: no samples, or fewer than two classes.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2 or len(probabilities) == 0 or probabilities.shape[1] < 2:
        raise UserError(f"Scores need probabilities (samples, 2 or more classes), not {probabilities.shape}.")
    n, C = probabilities.shape
    largest = probabilities.max(axis=1)
    h = np.bincount(probabilities.argmax(axis=1), minlength=C) / n
    entropy = -float(np.sum(h[h > 0] * np.log(h[h > 0])))
    share, classes = entropy / np.log(C), int((h >= 0.01).sum())
    return {"samples": n, "confident": float((largest >= CONFIDENT).mean()), "confidence": float(largest.mean()),
            "entropy": entropy, "normalised_entropy": float(share), "classes": classes,
            "collapsed": int(share < 0.5 or classes < C / 2)}
