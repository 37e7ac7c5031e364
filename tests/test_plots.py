"""Pictures: they exist, have the size they should, and show the numbers they were given."""

import numpy as np
import pytest
from PIL import Image

from lab.train import plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, instead of the files: what was drawn can be asked."""
    found = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: found.setdefault(path.name, figure) and path)
    return found


def pixels(path):
    return np.asarray(Image.open(path).convert("L")).astype(int)


def rows_of(steps=30):
    rows = [{"step": 0, "split": "validation", "loss": 2.0, "rmse": 1.0}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "split": "train", "loss": 2 / step, "accuracy": 1 - 1 / step, "learning_rate": 0.1,
                     "gradient_norm": 1.0, "update_norm": 0.1, "parameter_norm": 5.0})
    return [*rows, {"step": steps, "split": "validation", "loss": 0.1, "accuracy": 0.9, "rmse": 0.5},
            {"step": steps, "split": "test", "loss": 0.2, "accuracy": 0.8}]


def test_curves_are_files(tmp_path):
    written = plots.curves(rows_of(), tmp_path / "plots")
    assert [path.name for path in written] == ["loss.png", "learning_rate.png", "norms.png"]
    for path in written:
        assert Image.open(path).size == (840, 480) and pixels(path).std() > 5
    before = pixels(written[0])
    plots.curves([row | {"loss": row["loss"] + row["step"]} for row in rows_of()], tmp_path / "plots")
    assert (pixels(written[0]) != before).any()  # the old picture is replaced


def test_curves_of_several_metrics(figures, tmp_path):
    rows = rows_of()
    plots.curves(rows, tmp_path, ("loss", "accuracy", "rmse", "unknown"))
    assert list(figures) == ["loss.png", "accuracy.png", "rmse.png", "learning_rate.png", "norms.png"]
    lines = {name: {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
             for name, figure in figures.items()}
    assert list(lines["loss.png"]) == ["train, each step", "train, smoothed", "validation", "test"]
    np.testing.assert_array_equal(lines["loss.png"]["validation"], [[0, 2], [30, 0.1]])
    np.testing.assert_array_equal(lines["accuracy.png"]["test"], [[30, 0.8]])
    assert list(lines["rmse.png"]) == ["validation"]  # what training does not measure
    np.testing.assert_allclose(lines["loss.png"]["train, each step"][:, 1], [2 / k for k in range(1, 31)])
    plots.curves([row for row in rows if row["split"] == "validation"], tmp_path / "eval", "loss")
    assert len(figures) == 5  # and of no updates no norms


def test_smoothing_begins_at_the_first_value():
    assert plots._smooth([3.0] * 9, span=5) == pytest.approx([3.0] * 9)  # corrected for its start
    smooth = plots._smooth([0.0] * 50 + [1.0] * 50, span=5)
    assert smooth[49] == 0 and 0.15 < smooth[50] < 0.25 and smooth[-1] > 0.99


def matrix_of(classes):
    rng = np.random.default_rng(classes)
    return 30 * np.eye(classes, dtype=int) + (rng.random((classes, classes)) < 0.1)


@pytest.mark.parametrize("classes", [2, 20, 77, 300])
def test_confusion_is_readable(figures, tmp_path, classes):
    matrix = matrix_of(classes)
    matrix[0] = 0  # a class without records
    names = [f"intent_{i}" for i in range(classes)]
    plots.confusion(matrix, names, tmp_path / "c.png", "Test split")
    figure = figures["c.png"]
    axes = figure.axes[0]
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers == ({(p, t): str(matrix[t, p]) for t, p in np.argwhere(matrix)} if classes <= 20 else {})
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert (labels == names) == (classes <= 120)
    inches = figure.get_size_inches()
    if classes <= 120:  # each name has a line of its own: its size in points, 72 to the inch
        assert inches[1] * 0.75 * 72 / classes > axes.get_yticklabels()[0].get_fontsize()
    assert max(inches) < 25
    share = np.square(axes.images[0].get_array())
    np.testing.assert_allclose(share.sum(1), [0, *[1] * (classes - 1)], rtol=1e-6)
    assert share[1, 1] != pytest.approx(share[1, 0])


def test_confusion_is_a_file(tmp_path):
    """77 classes, as BANKING77 has, with names as long as its longest."""
    names = [f"balance_not_updated_after_cheque_or_cash_deposit_{i}" for i in range(77)]
    picture = pixels(plots.confusion(matrix_of(77), names, tmp_path / "plots" / "confusion.png"))
    assert picture.shape == (1746, 1920) and picture.std() > 10
    one, other = (pixels(plots.confusion(np.array(m), "ab", tmp_path / "small.png")) for m in ([[9, 1], [0, 9]],
                                                                                               [[9, 0], [1, 9]]))
    assert one.shape == other.shape and (one != other).any()


def test_scatter(figures, tmp_path):
    true = np.linspace(-2, 3, 50)
    predicted = true * 0.5
    predicted[7] = np.nan  # a model that diverged still gets its picture
    plots.scatter(true, predicted, tmp_path / "few.png", "title")
    axes = figures["few.png"].axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets()[:, 0], true)
    assert axes.get_xlim() == axes.get_ylim() and axes.get_xlim()[0] < -2 and axes.get_xlim()[1] > 3
    x, y = axes.lines[0].get_xydata().T
    np.testing.assert_array_equal(x, y)  # the diagonal
    many = np.arange(50_000.0)
    plots.scatter(many, -many, tmp_path / "many.png")
    shown = figures["many.png"].axes[0].collections[0].get_offsets()
    assert len(shown) == plots.POINTS and shown[0, 0] == 0 and shown[-1, 0] > 49_990
    np.testing.assert_array_equal(shown[:, 0], -shown[:, 1])  # still pairs
    plots.scatter(np.ones(1), np.ones(1), tmp_path / "one.png")
    plots.scatter(np.full(2, np.nan), np.full(2, np.nan), tmp_path / "none.png")
    assert set(figures) == {"few.png", "many.png", "one.png", "none.png"}


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid(tmp_path, channels):
    images = np.zeros((7, 8, 8, channels), np.uint8)
    images[3] = 255
    path = plots.image_grid(images, tmp_path / "grid.png", columns=3)
    picture = Image.open(path)
    assert picture.size == (540, 540)  # 3 x 3 places of 1.5 inches
    grey = pixels(path)
    assert grey[270, 90] == 255 and grey[90, 90] == grey[90, 270] == grey[450, 90] == 0  # only image 3 is white
    assert grey[450, 450] == 255  # no image there
    titled = Image.open(plots.image_grid(images, path, ["true a\npredicted b"] * 7, columns=3))
    assert titled.size[0] == 540 and titled.size[1] > 540


def test_image_grid_of_numbers(figures, tmp_path):
    images = np.linspace(-1, 3, 16).reshape(1, 4, 4, 1)
    plots.image_grid(images, tmp_path / "own.png")
    shown = figures["own.png"].axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, (images[0, ..., 0] + 1) / 4, atol=1e-6)
    plots.image_grid(images, tmp_path / "given.png", limits=(0, 1))
    shown = figures["given.png"].axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, np.clip(images[0, ..., 0], 0, 1), atol=1e-6)
    assert figures["own.png"].axes[0].images[0].get_clim() == (0, 1)
    plots.image_grid(np.full((2, 4, 4, 3), np.nan), tmp_path / "nan.png")
