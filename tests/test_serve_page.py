"""The page at /: one file that loads nothing from elsewhere; in a real browser, if there is one, it does its work."""

import asyncio
import base64
import hashlib
import io
import re
import shutil
import subprocess
import threading

import pytest

pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")
pytest.importorskip("uvicorn", reason="LAB_EXTRAS=serve")

from PIL import Image
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from lab.serve import app
from lab.serve.records import Form, Predictions
from lab.serve.requests import Limits
from lab.serve.worker import Worker
from tests.serving import language, live
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TABLE = Form("table", {"size": (), "town": ("Uri", "Zug")})
# Runs in the page as soon as it is ready; `done` reports. Until then the image keeps the browser loading.
DRIVER = """<img src="/hold" alt=""><script>
const done = text => fetch("/done", {method: "POST", body: text});
const until = (good, then) => { const t = setInterval(() => { if (good()) { clearInterval(t); then(); } }, 20); };
until(() => byId("state").textContent === "ready" && document.querySelector("textarea, input"), () => { %s });
</script>"""


def plain(form, rows=lambda path: [{"prediction": "b", "probabilities": {"a": 0.25, "b": 0.75}}]):
    """A service without a model."""
    service = Predictions("plain", Worker(lambda: None, 4, 30.0), form, rows)
    service.start()
    assert service.worker.ready.wait(10)
    return service


def test_it_is_one_file_and_may_run_its_own_script_only():
    with TestClient(app.build(plain(TABLE), limits=Limits(), key="k")) as client:
        found = client.get("/")
    assert found.status_code == 200 and found.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?:|//[a-z]|@import|url\(|innerHTML|<script [^>]*src|<link(?! rel=.icon. href=.data:)",
                         re.sub(r"^\s*// .*$", "", found.text, flags=re.MULTILINE))
    script = re.search(r"<script>(.*?)</script>", found.text, re.DOTALL)[1]
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = found.headers["content-security-policy"]
    assert f"script-src 'sha256-{own}';" in policy and "default-src 'none'" in policy
    for word in ("prefers-color-scheme: dark", 'name="viewport"', "aria-live", "focus-visible"):
        assert word in found.text


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens the page of a service in a browser, with a script that acts; the page afterwards."""
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    build = app.build

    def open_page(service, script, *flags):
        said, told = [], threading.Event()

        async def hold(request):
            await asyncio.to_thread(told.wait, 60)
            return Response(status_code=204)

        async def done(request):
            said.append((await request.body()).decode())
            told.set()
            return Response(status_code=204)

        text, headers = app.page()
        driven = DRIVER % script
        own = re.search(r"<script>(.*)<", driven, re.DOTALL)[1].encode()
        policy = headers["Content-Security-Policy"].replace("img-src", "img-src 'self'").replace(
            "script-src", f"script-src 'sha256-{base64.b64encode(hashlib.sha256(own).digest()).decode()}'")

        def with_driver(*rest, **named):
            made = build(*rest, **named)
            page = HTMLResponse(text.replace("</body>", f"{driven}</body>"), headers={
                "Content-Security-Policy": policy})
            made.router.routes += [Route("/driven", lambda request: page), Route("/hold", hold),
                                   Route("/done", done, methods=["POST"])]
            return made

        monkeypatch.setattr(app, "build", with_driver)
        with live(service) as port:
            ended = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                                    f"--user-data-dir={tmp_path / 'profile'}", *flags,
                                    f"http://127.0.0.1:{port}/driven"], timeout=120, capture_output=True, text=True)
        assert ended.returncode == 0 and said, (ended.stderr, re.search(r"<body.*?<script", ended.stdout, re.DOTALL))
        return said[0]

    return open_page


def test_a_chat_streams_and_remembers(opened):
    service = language()
    said = opened(service, """
        const text = document.querySelector("textarea"), fields = document.querySelectorAll("input");
        fields[0].value = "0"; fields[2].value = "9";
        text.value = "To be";
        text.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
        until(() => byId("main").textContent.includes("per second"), () => {
          text.value = "!";
          text.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
          until(() => document.querySelectorAll(".note").length > 2 &&
            [...byId("main").querySelectorAll(".note")].every(n => n.textContent.includes("per second")), () =>
            done(JSON.stringify([...document.querySelectorAll(".turn")].map(t => [...t.textContent].length))));
        });""")
    engine, text = service.engine, service.text
    assert service.close(10)
    lengths = [int(n) for n in re.findall(r"\d+", said)]
    assert lengths[0] == 5 and lengths[2] == 1 and 0 < lengths[1] <= 9
    assert bytes(max(engine.slots.ids, key=len)).startswith(b"To be") and text.eot is None


def test_a_table_and_an_image_show_bars(opened):
    seen = []

    def rows(path):
        seen.append(path.read_text() if path.is_file() else sorted(p.suffix for p in path.iterdir()))
        return [{"prediction": "b", "probabilities": {"a": 0.25, "b": 0.75}}]

    read = """until(() => document.querySelector(".bar"), () => done(
        [...document.querySelectorAll(".answer, .bar")].map(x => x.textContent).join(" ")));"""
    said = opened(plain(TABLE, rows), """
        document.querySelector("input").value = "12"; document.querySelector("select").value = "Zug";
        document.querySelector("button.main").click();""" + read)
    assert said == "b b75.0 % a25.0 %" and seen[0].splitlines()[-1] == '"12","Zug"'
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    content = list(file.getvalue())
    said = opened(plain(Form("images"), rows), f"""
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array({content})], "a.png", {{type: "image/png"}}));
        byId("drop").dispatchEvent(new DragEvent("drop", {{dataTransfer: files, cancelable: true}}));""" + read)
    assert said == "b b75.0 % a25.0 %" and seen[1] == [".png"]


def test_nothing_is_wider_than_a_phone(opened):
    many = Form("table", {f"a column with a rather long name {i}": () for i in range(12)})
    said = opened(plain(many), "done(document.documentElement.scrollWidth + ' of ' + innerWidth);",
                  "--window-size=500,900")
    width, room = map(int, said.split(" of "))
    assert width <= room <= 500
