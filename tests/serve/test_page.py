"""The web page in a browser, by clicks and keys: what it sends, what it shows, what it keeps.

A server of a few lines speaks the contract of s3dit/serve/api.py, so that every answer is known; Chromium is driven by
chromedriver over HTTP (W3C WebDriver).
"""

import base64
import io
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from s3dit.inputs.image_metadata import carried
from s3dit.serve import page
from s3dit.serve.fields import Fields
from s3dit.serve.limits import Limits

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EVIL = "<img src=x onerror=alert(1)><b>style</b>"
OPTIONS = {
    "model": "embedded", "variant": "tiny", "version": "0", "sizes": ["128x128", "64x64", "160x96", "96x160"],
    "defaults": {"size": "128x128", "num_inference_steps": 8, "guidance_scale": 0.0, "solver": "euler", "shift": 3.0},
    "loras": [{"name": EVIL, "scale": 0.5}, {"name": "ink", "scale": 1.0}], "references": 2,
    "limits": {"n": 4, "steps": 200, "pixels": 1 << 20, "side": 1024, "multiple": 16, "body": 1 << 25},
    "example": "a red star above a blue ring", "note": "",
    "fields": {door: {name: each.schema for name, each in Fields("embedded", Limits(), (EVIL, "ink")).of(door).items()}
               for door in ("generations", "edits")},
}  # fmt: skip
# WebDriver's names of keys.
CONTROL, ENTER, ESCAPE, LEFT, RIGHT, DELETE, TAB = "\ue009", "\ue007", "\ue00c", "\ue012", "\ue014", "\ue017", "\ue004"
DOWN, UP = "\ue015", "\ue013"


def picture(fields, color=None):
    """A PNG with metadata as the engine writes them, in a color that the seed chooses."""
    width, height = map(int, fields.get("size", "128x128").split("x"))
    seed = int(fields["seed"])
    image = Image.new("RGB", (width, height), color or (seed * 40 % 256, 90, 160))
    metadata = {"prompt": fields["prompt"], "width": width, "height": height, "seed": seed, "solver": "euler"}
    metadata |= {"num_inference_steps": int(fields.get("num_inference_steps", 8)), "guidance_scale": 0.0}
    out = io.BytesIO()
    image.save(out, "PNG", **carried(metadata, image.size, "PNG"))
    return base64.b64encode(out.getvalue()).decode()


class Server(ThreadingHTTPServer):
    """Answers as a prompt asks: "slow" holds after the first step until `go` is set, "refuse" is an error of a field."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.go, self.asked, self.hung_up, self.key, self.full = threading.Event(), [], threading.Event(), None, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def reply(self, status, body, kind="application/json", headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return False
        self.reply(401, {"error": {"message": "the API key is missing or wrong", "param": None}})
        return True

    def do_GET(self):
        if (found := page.files().get(self.path)) is not None:
            return self.reply(200, *found, page.HEADERS)
        return None if self.refused() else self.reply(200, OPTIONS)

    def body(self):
        """The fields, and the files by name, of JSON or of a form."""
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("generations"):
            return json.loads(raw), {}
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        fields, files = {}, {}
        for part in message_from_bytes(head + raw).get_payload():
            name = part.get_param("name", header="content-disposition")
            if part.get_filename():
                files.setdefault(name, []).append(part.get_payload(decode=True))
            else:
                fields[name] = part.get_payload(decode=True).decode()
        return fields, files

    def do_POST(self):
        if self.refused():
            return
        fields, files = self.body()
        if self.server.full:
            self.server.full -= 1
            self.reply(429, {"error": {"message": "the queue is full", "param": None}}, headers={"Retry-After": "1"})
            return
        self.server.asked.append((self.path, fields, files))
        if "refuse" in fields["prompt"]:
            wrong = {"message": "num_inference_steps is 300; needed 1 to 200", "param": "num_inference_steps"}
            self.reply(400, {"error": wrong})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.draw(fields)
        except OSError:
            self.server.hung_up.set()

    def event(self, kind, **data):
        self.wfile.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode())
        self.wfile.flush()

    def draw(self, fields):
        slow = "slow" in fields["prompt"]
        self.event("s3dit.queued", position=1)
        self.event("s3dit.started")
        self.event("s3dit.step", step=3, steps=8)
        self.event("image_generation.partial_image", b64_json=picture(fields, "gray"), output_format="png")
        while slow and not self.server.go.wait(0.05):
            self.wfile.write(b": waiting\n\n")
            self.wfile.flush()
        if "break" in fields["prompt"]:
            self.wfile.write(b'event: error\ndata: {"error": {"message": "a step gave NaN"}}\n\n')
            return
        self.event("s3dit.step", step=8, steps=8)
        self.event("image_generation.completed", b64_json=picture(fields), output_format="png", seconds={"steps": 1.5})


class Browser:
    """A session of chromedriver: elements are named by CSS selectors."""

    def __init__(self, base, chromium):
        self.base = base
        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                    "--hide-scrollbars", "--window-size=1280,900"]  # fmt: skip
        options = {"binary": chromium, "args": switches}
        made = self.call("POST", "/session", capabilities={"alwaysMatch": {"goog:chromeOptions": options}})
        self.base += f"/session/{made['sessionId']}"

    def call(self, method, path, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def run(self, script, *given):
        return self.call("POST", "/execute/sync", script=script, args=list(given))

    def devtools(self, command, **params):
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=params)

    def find(self, selector):
        found = self.call("POST", "/element", using="css selector", value=selector)
        return next(iter(found.values()))

    def click(self, selector):
        self.call("POST", f"/element/{self.find(selector)}/click")

    def type(self, selector, text):
        """Type into a field, in place of what it holds."""
        self.run("const e = document.querySelector(arguments[0]); e.value = ''; e.focus();", selector)
        self.call("POST", f"/element/{self.find(selector)}/value", text=text)

    def press(self, *keys):
        """Press keys on what has the focus; of several at once, the first ones are held."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self.call("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def drag(self, selector, *points, kind="mouse"):
        """Move a pointer, pressed, through points: parts of the element's sides, from 0 to 1."""
        box = self.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
        moves = [
            {"type": "pointerMove", "duration": 10, "x": round(box["x"] + x * box["width"]), "y": round(box["y"] + y * box["height"])}
            for x, y in points
        ]  # fmt: skip
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        source = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
        self.call("POST", "/actions", actions=[source])

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0])?.innerText ?? null", selector)

    def value(self, selector):
        return self.run("return document.querySelector(arguments[0]).value", selector)

    def seen(self, selector):
        """Whether an element is on the page and not hidden."""
        return self.run("return document.querySelector(arguments[0])?.checkVisibility() ?? false", selector)

    def until(self, script, *given):
        """Wait until a script's value is true, and return it."""
        end = time.monotonic() + 15
        while not (found := self.run(f"return {script}", *given)):
            assert time.monotonic() < end, f"not within 15 s: {script}"
            time.sleep(0.03)
        return found

    def tiles(self, count):
        self.until("document.querySelectorAll('#tiles .tile').length === arguments[0]", count)

    def shot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))
        return Image.open(path).convert("RGB")


@pytest.fixture(scope="module")
def chrome():
    chromium, driver = next(filter(None, map(shutil.which, NAMES)), None), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip(f"no browser is installed: needed chromedriver and one of {', '.join(NAMES)} on the path")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        port = next(found[1] for line in process.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        browser = Browser(f"http://127.0.0.1:{port}", chromium)
        yield browser
        browser.call("DELETE", "")
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def server():
    served = Server()
    yield served
    served.go.set()
    served.shutdown()
    served.server_close()


@pytest.fixture
def browser(chrome, server):
    """The browser with the page open; every test has a server, and so an origin and a store, of its own."""
    chrome.devtools("Emulation.clearDeviceMetricsOverride")
    chrome.devtools("Emulation.setEmulatedMedia", features=[])
    chrome.call("POST", "/url", url=server.address)
    chrome.until("!document.getElementById('form').hidden && document.title")
    yield chrome
    # A page that draws asks whether it may be left.
    server.go.set()
    chrome.run("document.querySelectorAll('.job button').forEach(e => e.click())")


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def give(browser, selector, data, name="given.png"):
    """Choose a file in a file field."""
    script = """const bytes = Uint8Array.from(atob(arguments[1]), c => c.charCodeAt(0)), box = new DataTransfer();
    box.items.add(new File([bytes], arguments[2], {type: "image/png"}));
    const e = document.querySelector(arguments[0]); e.files = box.files; e.dispatchEvent(new Event("change"));"""
    browser.run(script, selector, base64.b64encode(data).decode(), name)


def test_a_picture_forms_and_arrives(browser, server):
    browser.type("#prompt", "a slow <b>red</b> star")
    browser.type("#seed", "7")
    browser.click("[data-size='160x96']")
    browser.type("#field-num_inference_steps", "5")
    before = browser.run("return document.querySelector('#stage').getBoundingClientRect().toJSON()")
    browser.press(CONTROL, ENTER)
    browser.until("document.querySelector('.job .photo img')?.complete")
    assert browser.text(".job .says") == "step 3 of 8"
    assert browser.run("return document.title") == "3/8 · s3dit"
    shape = browser.run("const b = document.querySelector('.job .photo').getBoundingClientRect(); return b.width / b.height")
    assert shape == pytest.approx(160 / 96, rel=0.01)
    during = browser.run("return document.querySelector('.job').getBoundingClientRect().toJSON()")
    server.go.set()
    browser.tiles(1)
    # Nothing moved when pictures came.
    assert browser.run("return document.querySelector('.job').getBoundingClientRect().toJSON()") == during
    assert browser.run("return document.querySelector('#stage').getBoundingClientRect().toJSON()") == before
    assert re.fullmatch(r"finished in \d+\.\d s", browser.text(".job .says"))
    ((path, fields, files),) = server.asked
    assert path == "/v1/images/generations" and not files
    assert fields == {
        "prompt": "a slow <b>red</b> star", "size": "160x96", "num_inference_steps": 5, "seed": 7,
        "n": 1, "stream": True, "partial_images": 3, "progress": True,
    }  # fmt: skip


def test_several_pictures_count_up_and_one_is_cancelled(browser, server):
    browser.type("#prompt", "slow")
    browser.type("#seed", "9007199254740995")
    browser.type("#count", "3")
    browser.click("#draw")
    browser.until("document.querySelectorAll('.job .photo img').length === 3")
    browser.click(".job:nth-child(2) button")
    browser.until("document.querySelector('.job:nth-child(2)').classList.contains('stopped')")
    assert server.hung_up.wait(10)
    assert browser.text(".job:nth-child(2) .says") == "cancelled"
    server.go.set()
    browser.tiles(2)
    # Beyond 2**53, where JavaScript's own numbers are no longer exact.
    assert sorted(fields["seed"] for _, fields, _ in server.asked) == [9007199254740995 + i for i in range(3)]


def test_a_mask_is_painted_undone_inverted_and_sent(browser, server):
    browser.type("#prompt", "a ring")
    give(browser, "#image-file", png(Image.new("RGB", (100, 60), "teal")))
    browser.until("document.getElementById('image-shown').checkVisibility()")
    assert (browser.value("#field-width"), browser.value("#field-height")) == ("96", "48")
    browser.click("#paint")
    browser.drag("#mask", (0.25, 0.5), (0.25, 0.5))
    browser.drag("#mask", (0.75, 0.2), (0.75, 0.8), kind="touch")
    browser.press(CONTROL, "z")
    browser.click("#paint-done")
    browser.until("!document.getElementById('painter').open && document.getElementById('mask-remove').checkVisibility()")
    browser.type("#field-strength", "0.8")
    browser.click("#draw")
    browser.tiles(1)
    path, fields, files = server.asked[-1]
    assert path == "/v1/images/edits" and fields["strength"] == "0.8" and fields["size"] == "96x48"
    mask = np.asarray(Image.open(io.BytesIO(files["mask_image"][0])).convert("L"))
    assert Image.open(io.BytesIO(files["image"][0])).size == (100, 60) and mask.shape == (60, 100)
    # The second stroke is undone: white is a disc of the brush, 15 % of the shorter side, and nothing else.
    rows, columns = np.nonzero(mask > 127)
    assert abs(rows.mean() - 29.5) < 1 and abs(columns.mean() - 24.5) < 1
    assert (mask > 127).sum() == pytest.approx(np.pi * 4.5**2, rel=0.15)
    # By keys alone: the brush starts in the middle; inverted, then a bar is taken out of it.
    browser.run("document.getElementById('paint').focus()")
    browser.press(ENTER)
    browser.until("document.activeElement.id === 'mask'")
    for keys in (["i"], ["e"], [" ", RIGHT, RIGHT, RIGHT], [ENTER]):
        browser.press(*keys)
    browser.until("!document.getElementById('painter').open")
    browser.press(CONTROL, ENTER)
    browser.tiles(2)
    inverted = np.asarray(Image.open(io.BytesIO(server.asked[-1][2]["mask_image"][0])).convert("L"))
    assert inverted[30, 25] == 0 and inverted[30, 50] == 0 and inverted[5, 5] == 255 and inverted[30, 90] == 255
    # Cancelled, cleared, removed.
    browser.click("#paint")
    browser.click("#tool-clear")
    browser.press(ESCAPE)
    browser.until("!document.getElementById('painter').open")
    assert browser.seen("#mask-remove")
    browser.click("#image-remove")
    browser.until("document.getElementById('image-drop').checkVisibility()")
    browser.click("#draw")
    browser.tiles(3)
    assert server.asked[-1][0].endswith("generations") and "strength" not in server.asked[-1][1]


def test_loras_references_and_guidance(browser, server):
    browser.click("#lora-group summary")
    assert browser.text(".lora .tick") == EVIL and not browser.seen(".lora b")
    browser.click(".lora:nth-child(2) input[type=checkbox]")
    browser.type(".lora:nth-child(2) input[type=number]", "0.7")
    assert not browser.seen("#negative_prompt")
    browser.type("#field-guidance_scale", "3.5")
    browser.type("#negative_prompt", "blur")
    browser.type("#prompt", "a ring")
    browser.press(CONTROL, ENTER)
    browser.tiles(1)
    _, fields, _ = server.asked[-1]
    assert fields["lora"] == [{"name": "ink", "scale": 0.7}]
    assert (fields["guidance_scale"], fields["negative_prompt"]) == (3.5, "blur")
    browser.click("#reference-group summary")
    for color in ("red", "green", "blue"):
        give(browser, "#reference-file", png(Image.new("RGB", (32, 32), color)))
    browser.until("document.querySelectorAll('#references figure').length === 2")
    assert "2 pictures at most" in browser.text("#toast")
    browser.press(CONTROL, ENTER)
    browser.tiles(2)
    path, fields, files = server.asked[-1]
    assert path.endswith("edits") and len(files["reference"]) == 2 and json.loads(fields["lora"])[0]["name"] == "ink"


def test_the_gallery_replays_compares_deletes_and_stays(browser, server, tmp_path):
    browser.run("window.fired = 0; window.alert = () => fired++")
    for seed, prompt in ((1, EVIL), (2, "a blue ring")):
        browser.type("#prompt", prompt)
        browser.type("#seed", str(seed))
        browser.press(CONTROL, ENTER)
        browser.tiles(seed)
    browser.click("#seed-random")
    browser.click("#seed-keep")
    assert browser.value("#seed") == "2"
    browser.click("[data-size='64x64']")
    browser.click(".cover")
    assert browser.text("#view-prompt") == "a blue ring"
    browser.press(RIGHT)
    assert browser.text("#view-prompt") == EVIL and "Seed" in browser.text("#view-facts")
    assert json.loads(browser.run("return document.getElementById('view-all').textContent"))["seed"] == 1
    assert browser.run("return document.getElementById('view-save').download").startswith("s3dit-1-")
    browser.click("#view-use")
    assert (browser.value("#prompt"), browser.value("#seed")) == (EVIL, "1")
    browser.press(CONTROL, ENTER)
    browser.tiles(3)
    first, _, again = server.asked
    assert again == first
    # Marked by keys, compared.
    browser.run("document.querySelector('.place:nth-child(1) .tile').focus()")
    for key in ("x", RIGHT, "x"):
        browser.press(key)
    browser.click("#compare")
    assert browser.text("#differences").count("\n") <= 3 and "a blue ring" in browser.text("#differences")
    browser.press(ESCAPE)
    # Deleted, taken back, deleted; and still so in another visit.
    browser.run("document.querySelector('.place:nth-child(1) .tile').focus()")
    browser.press(DELETE)
    browser.tiles(2)
    browser.until("document.querySelector('#toast button')?.innerText === 'Undo'")
    browser.click("#toast button")
    browser.tiles(3)
    browser.run("document.querySelector('.place:nth-child(3) .tile').focus()")
    browser.press(DELETE)
    browser.tiles(2)
    assert browser.run("return fired") == 0
    browser.call("POST", "/refresh")
    browser.tiles(2)
    assert browser.value("#prompt") == EVIL


def test_a_picture_from_elsewhere_brings_its_settings(browser):
    metadata = {"prompt": "from elsewhere", "width": 64, "height": 96, "seed": 2**63 - 1, "shift": 3.0, "sigmas": [1, 0.5],
                "region": [{}], "engine": {}, "solver": "heun"}  # fmt: skip
    for form in ("PNG", "JPEG", "WEBP"):
        out = io.BytesIO()
        Image.new("RGB", (64, 96)).save(out, form, **carried(metadata | {"prompt": form}, (64, 96), form))
        give(browser, "#image-file", out.getvalue(), form)
        browser.until("document.querySelector('#toast button')?.innerText === 'Use its settings'")
        browser.click("#toast button")
        browser.until("document.getElementById('prompt').value === arguments[0]", form)
        found = [browser.value(f"#{name}") for name in ("field-width", "field-height", "seed", "field-sigmas", "field-shift")]
        assert found == ["64", "96", str(2**63 - 1), "1,0.5", ""] and browser.value("#field-solver") == '"heun"'
        # What the form has no place for is said.
        assert browser.text("#toast span").endswith("does not draw with: Region.")
    give(browser, "#image-file", b"no picture")
    browser.until("document.getElementById('toast').innerText.includes('cannot be read')")


def test_what_is_wrong_is_said_where_it_is(browser, server):
    browser.click("#draw")
    assert "needed a prompt" in browser.text("[data-field=prompt] .wrong") and not server.asked
    assert browser.run("return document.activeElement.id") == "prompt"
    browser.type("#prompt", "refuse this")
    assert not browser.seen("[data-field=prompt] .wrong")
    browser.type("#field-width", "100")
    browser.click("#draw")
    assert browser.seen("[data-field=width] .wrong") and not server.asked
    browser.type("#field-width", "96")
    browser.click("#draw")
    browser.until("document.querySelector('[data-field=num_inference_steps] .wrong')")
    assert "needed 1 to 200" in browser.text("[data-field=num_inference_steps] .wrong")
    assert browser.run("return document.activeElement.getAttribute('aria-invalid')") == "true"
    browser.type("#prompt", "break")
    browser.click("#draw")
    browser.until("document.getElementById('trouble').innerText.includes('NaN')")
    browser.type("#count", "99")
    browser.click("#draw")
    assert "64" in browser.text("[data-field=count] .wrong")
    browser.type("#count", "1")
    # A full queue is waited for.
    server.full = 1
    browser.type("#prompt", "a ring")
    browser.click("#draw")
    browser.until("document.querySelector('.job .says').innerText.includes('trying again in 1 s')")
    browser.tiles(1)
    server.shutdown()
    server.server_close()
    browser.click("#draw")
    browser.until("document.getElementById('trouble').innerText.includes('does not answer')")


def test_a_key_is_asked_for(chrome, server):
    server.key = "secret"
    chrome.call("POST", "/url", url=server.address)
    chrome.until("document.getElementById('key-dialog').open")
    chrome.type("#key", "wrong" + ENTER)
    chrome.until("document.getElementById('key-wrong').checkVisibility()")
    chrome.type("#key", "secret" + ENTER)
    chrome.until("!document.getElementById('form').hidden")
    assert chrome.run("return localStorage.getItem('s3dit.key') ?? sessionStorage.getItem('s3dit.key')") == "secret"


def test_by_keys_alone(browser, server):
    """From the prompt through the form to a picture, its window and back; all that takes the focus shows it."""
    browser.run("document.getElementById('prompt').focus()")
    browser.press("a")
    browser.press(CONTROL, ENTER)
    browser.tiles(1)
    reached = []
    for _ in range(60):
        browser.press(TAB)
        at = browser.run("""const e = document.activeElement, ring = e.closest('.drop, .place') ?? e;
            return [e.id || e.className, getComputedStyle(ring).outlineStyle, !!(e.labels?.length || e.innerText ||
            e.ariaLabel || e.title || e.alt)]""")
        reached.append(at[0])
        assert at[1] != "none" and at[2], at
        if at[0] == "tile":
            break
    assert {"field-width", "seed", "draw", "count", "tile"} <= set(reached), reached
    browser.press(ENTER)
    browser.until("document.getElementById('viewer').open")
    browser.press(ESCAPE)
    browser.until("!document.getElementById('viewer').open && document.activeElement.className === 'tile'")
    browser.press("/")
    assert browser.run("return document.activeElement.id") == "prompt"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_light_and_dark(browser, server, tmp_path, scheme):
    browser.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    give(browser, "#image-file", png(Image.new("RGB", (300, 200), "teal")))
    browser.type("#prompt", "a ring")
    browser.click("#draw")
    browser.tiles(1)
    browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.run("return document.documentElement.scrollWidth") == 360
    for opener, window in (("#paint", "#painter"), (".tile", "#viewer")):
        browser.click(opener)
        box = browser.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", window)
        assert box["left"] >= 0 and box["right"] <= 360
        browser.press(ESCAPE)
    browser.run("scrollTo(0, 0)")
    paper = browser.shot(tmp_path / "shot.png").getpixel((3, 300))
    assert max(paper) < 64 if scheme == "dark" else min(paper) > 230


def test_the_page_asks_nothing_of_others():
    """No address of elsewhere, no markup made of texts, no code in the document: what the policy forbids is not tried."""
    files = page.files()
    assert set(files) >= {"/", "/page.css", "/main.js"}
    for name, (data, _) in files.items():
        text = data.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\binnerHTML|outerHTML|insertAdjacentHTML|\beval\(|document\.write", text), name
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", files["/"][0].decode())
