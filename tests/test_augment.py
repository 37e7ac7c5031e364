"""Augmentation against NumPy and SciPy, and that it depends on (seed, step, record) alone."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lab.data.images.augment import Augment, draw, middle, resample, symmetric_beta
from lab.data.images.idx import Idx
from lab.data.images.images import Images
from lab.errors import UserError

N = 254  # no record of class i follows one of class i, also not the first one the last
EVERYTHING = Augment(crop=2, flip=True, rotate=20, shift=0.1, zoom=0.2, cutout=4)


def images(n=64, height=12, width=10, channels=3, seed=0):
    return np.random.default_rng(seed).integers(1, 255, (n, height, width, channels), np.uint8)


def data(augment, shape=(12, 10, 3), **kwargs):
    return Images(Idx("nowhere"), shape, augment=augment, classes=5, **kwargs)


@jax.jit
def keys(indices, step=0, seed=0):
    """As the step makes them."""
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"records")), step)
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(indices)


place = jax.jit(resample, static_argnums=4)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Compiling takes most of the time here; what is compiled has no need to be fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.lru_cache
def compiled(ingredient, train=True):
    return jax.jit(lambda batch: ingredient.transform(batch, train))


def run(ingredient, pixels, step=0, seed=0, train=True, indices=None):
    """Transformed inputs back in 0..255 (mean 0.5, std 0.5), and the targets."""
    indices = np.arange(len(pixels)) if indices is None else indices
    batch = {"inputs": pixels, "targets": np.asarray(indices) % 5, "key": keys(indices, step, seed)}
    out = compiled(ingredient, train)(batch)
    return np.asarray(out["inputs"]) * 127.5 + 127.5, np.asarray(out["targets"])


def test_without_augmentation_it_only_normalises():
    x = images()
    ingredient = data(Augment(), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    out = ingredient.transform({"inputs": x}, train=True)["inputs"]  # needs neither keys nor targets
    np.testing.assert_allclose(out, (x / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6], atol=1e-6)
    program = str(jax.make_jaxpr(lambda x: ingredient.transform({"inputs": x}, train=True))(x))
    assert "random" not in program and "gather" not in program and "slice" not in program


def test_evaluation_never_augments():
    x = images()
    everything = dataclasses.replace(EVERYTHING, mixup=1.0, cutmix=1.0)
    out, targets = run(data(everything), x, train=False)
    np.testing.assert_allclose(out, x, atol=1e-3)
    assert np.array_equal(targets, np.arange(64) % 5)
    assert np.abs(run(data(everything), x)[0] - x).max() > 50  # negative control: training does


def test_flip():
    x = images(4096, 2, 2, 1)
    out, _ = run(data(Augment(flip=True), (2, 2, 1)), x)
    flipped = np.abs(out - x[:, :, ::-1]).max((1, 2, 3)) < 1e-3
    same = np.abs(out - x).max((1, 2, 3)) < 1e-3
    assert (flipped | same).all()
    assert abs(flipped[~same].size / 4096 - 0.5) < 4 * 0.5 / 64  # four standard deviations
    upside_down = np.abs(out - x[:, ::-1]).max((1, 2, 3)) < 1e-3
    assert upside_down.mean() < 0.1  # negative control


@pytest.mark.parametrize("padding, mode", [("zero", "constant"), ("reflect", "reflect")])
def test_crop_is_a_window_of_the_padded_image(padding, mode):
    x = images(N)
    out, _ = run(data(Augment(crop=2, padding=padding)), x)

    def places(padded):
        windows = np.lib.stride_tricks.sliding_window_view(padded, (12, 10), (1, 2))  # (n, 5, 5, C, 12, 10)
        differ = np.abs(np.moveaxis(windows, 3, 5) - out[:, None, None]).max((3, 4, 5))
        return np.argwhere(differ < 1e-3)

    pad = ((0, 0), (2, 2), (2, 2), (0, 0))
    found = places(np.pad(x, pad, mode=mode))
    assert np.array_equal(found[:, 0], np.arange(N))  # exactly one place each
    assert len({tuple(p) for p in found[:, 1:]}) == 25 and (np.bincount(found[:, 1]) > 20).all()
    assert len(places(np.pad(x, pad, mode="edge"))) < 50  # negative control


def test_cutout_is_a_square_of_the_mean_colour():
    x = images(N)
    ingredient = data(Augment(cutout=5), mean=(0.3,), std=(0.2,))
    batch = {"inputs": x, "targets": np.zeros(N, int), "key": keys(np.arange(N))}
    out = np.asarray(compiled(ingredient)(batch)["inputs"])
    plain = (x / 255 - 0.3) / 0.2
    numbers = np.asarray(draw(batch["key"])["cutout"])
    for i in range(N):
        row, column = int(numbers[i, 0] * 12), int(numbers[i, 1] * 10)
        expected = plain[i].copy()
        expected[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = 0
        np.testing.assert_allclose(out[i], expected, atol=1e-5)
    holes = (out == 0).all(-1).sum((1, 2))
    assert holes.max() == 25 and holes.min() < 20  # whole inside, clipped at the border


# ------------------------------------------------------------------------------------------------- resampling


def ramp(n, height, width):
    """Images whose two channels are their own coordinates, so that what was resampled can be read off."""
    image = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    return np.broadcast_to(image.astype(np.float32), (n, height, width, 2))


def still(n, height, width):
    return jnp.tile((jnp.array([height, width]) - 1) / 2, (n, 1)), jnp.ones((n, 2))


def test_rotation_by_nothing_and_by_quarters():
    x = images(3, 12, 12)
    centre, scale = still(3, 12, 12)
    for angle in (None, jnp.zeros(3)):
        assert np.array_equal(place(x, centre, scale, angle, (12, 12)), x)
    for quarters in (1, 2, 3):
        out = place(x, centre, scale, jnp.full(3, quarters * jnp.pi / 2), (12, 12))
        np.testing.assert_allclose(out, np.rot90(x, quarters, (1, 2)), atol=0.01)
        assert np.abs(out - np.rot90(x, -quarters + 4 * (quarters == 2) + (quarters == 2), (1, 2))).max() > 50


def test_resampling_is_scipys():
    x = images(4, 12, 10)
    rng = np.random.default_rng(1)
    centre, scale = rng.uniform(3, 8, (4, 2)), rng.uniform(0.5, 1.5, (4, 2))
    for angles in (rng.uniform(-3, 3, 4), None):
        out = np.asarray(place(x, jnp.array(centre), jnp.array(scale), None if angles is None else
                                  jnp.array(angles), (9, 7)))
        for i in range(4):
            sin, cos = (0.0, 1.0) if angles is None else (np.sin(angles[i]), np.cos(angles[i]))
            matrix = np.array([[cos, sin], [-sin, cos]]) @ np.diag(scale[i])
            offset = centre[i] - matrix @ [4, 3]
            for c in range(3):
                want = scipy.ndimage.affine_transform(x[i, ..., c].astype(float), matrix, offset, (9, 7), order=1,
                                                      mode="nearest")
                np.testing.assert_allclose(out[i, ..., c], want, atol=0.01)
                other = scipy.ndimage.affine_transform(x[i, ..., c].astype(float), matrix.T, offset, (9, 7), order=1,
                                                       mode="nearest")
                assert angles is None or np.abs(out[i, ..., c] - other).max() > 10  # negative control


def measured(augment, size=(41, 31), stored=(41, 31), n=500):
    """Centre (n, 2), and the matrix (n, 2, 2) of input per output pixel, at the middle of resampled ramps."""
    move = jax.jit(lambda key: augment.move(ramp(n, *stored), draw(key), size))
    out = np.asarray(move(keys(np.arange(n))))
    y, x = size[0] // 2, size[1] // 2
    matrix = np.stack([out[:, y + 1, x] - out[:, y, x], out[:, y, x + 1] - out[:, y, x]], -1)
    return out[:, y, x], matrix, out


def test_rotate_shift_and_zoom_are_what_their_names_say():
    centre, matrix, _ = measured(Augment(rotate=30, shift=0.1, zoom=0.2, flip=True))
    mirrored = np.linalg.det(matrix) < 0
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(mirrored))
    matrix[mirrored, :, 1] *= -1
    size = np.sqrt(np.linalg.det(matrix))
    angle = np.degrees(np.arctan2(matrix[:, 0, 1], matrix[:, 0, 0]))
    moved = (centre - [20, 15]) / [41, 31]
    for values, low, high in ((1 / size, 0.8, 1.2), (angle, -30, 30), *((part, -0.1, 0.1) for part in moved.T)):
        assert values.min() > low - 1e-3 and values.max() < high + 1e-3
        assert scipy.stats.kstest(values, scipy.stats.uniform(low, high - low).cdf).pvalue > 1e-3
    together = np.corrcoef(np.stack([size, angle, *moved.T, mirrored]))
    assert np.abs(together - np.eye(5)).max() < 0.2  # independent of each other


def test_resized_crop_has_the_area_and_stays_inside():
    centre, matrix, out = measured(Augment(resized_crop=0.25), size=(21, 21), stored=(40, 40))
    scale = matrix[:, [0, 1], [0, 1]] * 21 / 40  # height and width as parts of the image
    area, aspect = scale.prod(1), scale[:, 1] / scale[:, 0]
    clipped = scale.max(1) > 0.999
    assert 0.24 < area.min() < 0.28 and area.max() > 0.95 and (aspect > 0.74).all() and (aspect < 1.35).all()
    assert 0.02 < clipped.mean() < 0.4
    pixels = centre[:, None] + np.array([-0.5, 0.5])[None, :, None] * scale[:, None] * 40  # first and last edge
    assert pixels.min() > -0.51 and pixels.max() < 39.51
    edge = np.abs(pixels[:, 0] + 0.5).min(1)  # parts reach every edge, and are not centred
    assert edge.min() < 0.5 and pixels[:, 0].max() > 15
    assert out.min() >= 0 and out.max() <= 39


def test_a_border_is_room_to_move_and_evaluation_takes_the_middle():
    x = images(N, 16, 14)
    assert np.array_equal(middle(x, (12, 10)), x[:, 2:-2, 2:-2])
    ingredient = data(Augment(flip=True), border=2)
    assert ingredient.record_spec()["inputs"][0] == (16, 14, 3)
    np.testing.assert_allclose(run(ingredient, x, train=False)[0], x[:, 2:-2, 2:-2], atol=1e-3)
    out, _ = run(data(Augment(crop=1), border=2), x)  # 1 + 2 pixels on each side: 7 x 7 places
    corner = np.array([np.argwhere(np.abs(np.pad(x[i], ((1, 1), (1, 1), (0, 0))) - out[i, 5, 5]).max(-1) < 1e-3)[0] - 5
                       for i in range(N)])
    assert corner.min() == 0 and corner.max() == 6


# ----------------------------------------------------------------------------------------------------- mixing


def partners(x, targets):
    return np.roll(x, -1, 0).astype(float), np.roll(np.eye(5)[targets], -1, 0)


def agrees(values, alpha):
    """Whether the shares of values below some places are those of Beta(alpha, alpha), within 4 standard deviations.

    Not Kolmogorov-Smirnov's test: for small alpha many values are so near to 1 that float32 rounds them to it.
    """
    places = np.array([0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
    expected = scipy.stats.beta(alpha, alpha).cdf(places)
    found = (values[:, None] < places).mean(0)
    return (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(values)) + 1e-6).all()


def test_mixup():
    x, labels = images(N), np.arange(N) % 5
    out, targets = run(data(Augment(mixup=0.4)), x)
    other, other_label = partners(x, labels)
    share = targets[np.arange(N), labels]
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    assert targets.min() >= 0
    want = share[:, None] * np.eye(5)[labels] + (1 - share[:, None]) * other_label
    np.testing.assert_allclose(targets, want, atol=1e-6)
    share = share[:, None, None, None]
    np.testing.assert_allclose(out, share * x + (1 - share) * other, atol=0.01)
    assert np.abs(out - (share * x + (1 - share) * np.roll(x, 1, 0))).max() > 50  # negative control: the previous one
    assert agrees(share.ravel(), 0.4)


def own_part(out, x, other):
    """Fraction of pixels that are the record's own; -1 where some pixel is neither its own nor the partner's."""
    own, theirs = (np.abs(out - y).max(-1) < 1e-3 for y in (x, other))
    return np.where((own | theirs).all((1, 2)), own.mean((1, 2)), -1)


def test_cutmix():
    x, labels = images(N, 24, 20), np.arange(N) % 5
    out, targets = run(data(Augment(cutmix=1.0), (24, 20, 3)), x)
    other, _ = partners(x, labels)
    np.testing.assert_allclose(own_part(out, x, other), targets[np.arange(N), labels], atol=1e-5)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    pasted = np.abs(out - x).max(-1) > 1e-3
    for mask in pasted:  # one rectangle each
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()
    # Without clipping the mean would be a half; a box around a random centre loses some of its area.
    assert 0.25 < pasted.mean() < 0.45


def test_mixup_and_cutmix_share_the_records():
    x, labels = images(N), np.arange(N) % 5
    out, targets = run(data(Augment(mixup=1.0, cutmix=1.0)), x)
    part = own_part(out, x, partners(x, labels)[0])
    pasted = part >= 0
    assert 0.35 < pasted.mean() < 0.65
    np.testing.assert_allclose(part[pasted], targets[np.arange(N), labels][pasted], atol=1e-5)
    blended, _ = run(data(Augment(mixup=1.0)), x)
    np.testing.assert_allclose(out[~pasted], blended[~pasted], atol=1e-3)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_the_beta_distribution(alpha):
    numbers = np.random.default_rng(3).uniform(size=(20_000, 2)).astype(np.float32)
    values = np.asarray(symmetric_beta(jnp.asarray(numbers), alpha))
    assert values.min() >= 0 and values.max() <= 1
    assert agrees(values, alpha)
    assert not agrees(values, alpha * 1.2) and not agrees(values**1.1, alpha)  # negative controls


def test_the_beta_distribution_at_the_ends_of_the_numbers():
    ends = jnp.array([[u, v] for u in (0.0, 1e-7, 1 - 1.2e-7) for v in (0.0, 0.25, 0.5, 1 - 1.2e-7)])
    for alpha in (0.01, 0.2, 1.0, 100.0):
        values = np.asarray(symmetric_beta(ends, alpha))
        assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1


# -------------------------------------------------------------------------------------------- what it depends on


def test_it_depends_on_seed_step_and_record_alone():
    x, ingredient = images(64), data(EVERYTHING)
    out, _ = run(ingredient, x)
    order = np.random.default_rng(0).permutation(64)[:24]  # another order and another size
    np.testing.assert_allclose(run(ingredient, x[order], indices=order)[0], out[order], atol=0.01)
    for step, seed in ((1, 0), (0, 1)):
        assert (np.abs(run(ingredient, x, step, seed)[0] - out).max((1, 2, 3)) > 20).mean() > 0.95
    # The record's number counts, not what is in it.
    assert (np.abs(run(ingredient, x, indices=np.arange(64) + 64)[0] - out).max((1, 2, 3)) > 20).mean() > 0.95


def test_eight_devices_do_the_same():
    x = images(64)
    ingredient = data(dataclasses.replace(EVERYTHING, mixup=0.5, cutmix=0.5))
    out, targets = run(ingredient, x)
    rows = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    batch = {"inputs": x, "targets": np.arange(64) % 5, "key": keys(np.arange(64))}
    got = jax.jit(lambda batch: ingredient.transform(batch, True))(jax.device_put(batch, rows))
    assert len(jax.devices()) == 8 and len(got["inputs"].sharding.device_set) == 8
    np.testing.assert_allclose(got["inputs"] * 127.5 + 127.5, out, atol=0.01)
    np.testing.assert_allclose(got["targets"], targets, atol=1e-5)


def test_one_operation_changes_no_random_number_of_another():
    x = images(64)
    flipped, _ = run(data(Augment(flip=True)), x)
    both, _ = run(data(Augment(flip=True, cutout=5)), x)
    seen = np.abs(both - 127.5).max(-1) > 1e-3  # not cut out (127.5 is the mean)
    assert 0.7 < seen.mean() < 0.95
    np.testing.assert_allclose(both[seen], flipped[seen], atol=1e-3)


@pytest.mark.parametrize("kwargs, name", [
    ({"crop": -1}, "crop"), ({"crop": 12}, "crop"), ({"rotate": 200}, "rotate"), ({"shift": -0.1}, "shift"),
    ({"zoom": 1.0}, "zoom"), ({"resized_crop": 1.5}, "resized-crop"), ({"cutout": 99}, "cutout"),
    ({"mixup": -1}, "mixup"), ({"crop": 2, "resized_crop": 0.1}, "two ways"),
])
def test_values_out_of_range(kwargs, name):
    with pytest.raises(UserError, match=name):
        data(Augment(**kwargs)).validate()


def test_mixing_needs_the_number_of_classes():
    ingredient = data(Augment(mixup=0.2))
    ingredient.validate()
    assert ingredient.metadata()["classes"] == 5
    with pytest.raises(UserError, match="--data.classes"):
        dataclasses.replace(ingredient, classes=None).validate()
