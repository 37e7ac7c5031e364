"""The report in a real browser, where there is one: text and pictures are seen, and nothing comes from elsewhere."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from lab.study.report.report import report
from tests.studies import make_study

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# What a table lacks in width, of the one that lacks most.
MEASURE = """<script>document.title = "lacks " + Math.max(...[...document.querySelectorAll(".wide")].map(
    box => box.scrollWidth - box.clientWidth))</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_no_table_is_cut_at_1200_pixels(tmp_path):
    """The table of comparisons has 14 columns. Where its cells may not wrap, it does not fit."""
    arms = {f"peak={peak:g},width={width}": {"optim.lr.peak": peak, "model.width": width}
            for peak in (1e-4, 3e-4, 3e-3) for width in (64, 128)}
    page = (report([make_study(tmp_path / "sweep-1", arms)], quiet=True) / "report.html").read_text()
    unwrapped = page.replace("</style>", "td, th { white-space: nowrap; }</style>")
    lacks = []
    for name, text in (("page", page), ("unwrapped", unwrapped)):
        (tmp_path / f"{name}.html").write_text(text.replace("</body>", f"{MEASURE}</body>"))
        done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,800",
                               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                               (tmp_path / f"{name}.html").as_uri()],
                              check=True, timeout=120, capture_output=True, text=True)
        lacks.append(int(re.search(r"<title>lacks (\d+)</title>", done.stdout)[1]))
    assert lacks[0] == 0 and lacks[1] > 100, lacks


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_the_report_opens_in_a_browser(tmp_path):
    study = make_study(tmp_path / "norms-1", {"rms": {"model.norm": "rmsnorm"}}, {"rms": -0.2})
    page = report([study], quiet=True) / "report.html"
    moved = tmp_path / "alone" / "page.html"  # without the pictures beside it: they are inside
    moved.parent.mkdir()
    shutil.copy(page, moved)
    empty = moved.with_name("empty.html")
    empty.write_text(moved.read_text().replace("src=\"data:image/png;base64,", "src=\"data:image/png;base64,broken"))
    seen = []
    for path in (moved, empty):
        subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
                        "--window-size=1100,3000", f"--screenshot={path.with_suffix('.png')}", path.as_uri()],
                       check=True, timeout=120, capture_output=True)
        image = np.asarray(Image.open(path.with_suffix(".png")).convert("RGB"), np.int32)
        assert image.shape == (3000, 1100, 3)
        assert (image.sum(-1) < 300).mean() > 0.002  # dark on light: there is text
        coloured = image.max(-1) - image.min(-1) > 60
        seen.append(coloured.mean())
    assert seen[0] > 1e-3 and seen[0] > 3 * seen[1]  # pictures have colour, the text next to none
