"""The report in a real browser, where there is one: text and pictures are seen, and nothing comes from elsewhere."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from lab.study.report import report
from tests.studies import make_study

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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
