"""Chromium driven by chromedriver over HTTP, as W3C WebDriver says, with the standard library alone."""

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Seconds that a machine with other work may take for what takes less than one.
PATIENCE = 30
# WebDriver's names of keys.
CONTROL, ENTER, ESCAPE, RIGHT, DELETE, TAB = "\ue009", "\ue007", "\ue00c", "\ue014", "\ue017", "\ue004"


class Browser:
    """A session of chromedriver: elements are named by CSS selectors."""

    def __init__(self, base, chromium):
        self.base = base
        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                    "--hide-scrollbars", "--window-size=1280,900",
                    # Without a GPU every frame of an animation is drawn by the processor.
                    "--force-prefers-reduced-motion"]  # fmt: skip
        wanted = {"goog:chromeOptions": {"binary": chromium, "args": switches}, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.call("POST", "/session", capabilities={"alwaysMatch": wanted})
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

    def complaints(self):
        """What the browser complained of since this was asked last, answers of the server that are errors left out."""
        entries = self.call("POST", "/se/log", type="browser")
        return [each["message"] for each in entries if each["level"] == "SEVERE" and each["source"] != "network"]

    def find(self, selector):
        found = self.call("POST", "/element", using="css selector", value=selector)
        return next(iter(found.values()))

    def click(self, selector):
        """Click on an element, when it is there to be clicked."""
        self.until("document.querySelector(arguments[0])?.checkVisibility()", selector)
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
        self.until("document.querySelector(arguments[0]).checkVisibility()", selector)
        box = self.box(selector)
        places = [(round(box["x"] + x * box["width"]), round(box["y"] + y * box["height"])) for x, y in points]
        moves = [{"type": "pointerMove", "duration": 10, "x": x, "y": y} for x, y in places]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        source = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
        self.call("POST", "/actions", actions=[source])

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0])?.innerText ?? null", selector)

    def value(self, selector):
        return self.run("return document.querySelector(arguments[0]).value", selector)

    def box(self, selector):
        """Where an element is: x, y, width, height, left, right, top, bottom in pixels."""
        return self.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)

    def seen(self, selector):
        """Whether an element is on the page and not hidden."""
        return self.run("return document.querySelector(arguments[0])?.checkVisibility() ?? false", selector)

    def until(self, script, *given):
        """Wait until a script's value is true, and return it."""
        end = time.monotonic() + PATIENCE
        while not (found := self.run(f"return {script}", *given)):
            assert time.monotonic() < end, f"not within {PATIENCE} s: {script} {given}"
            time.sleep(0.03)
        return found

    def tiles(self, count):
        self.until("document.querySelectorAll('#tiles .tile').length === arguments[0]", count)

    def shot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))
        return Image.open(path).convert("RGB")


def programs():
    """The paths of Chromium and chromedriver; None for one that is not installed."""
    return next(filter(None, map(shutil.which, NAMES)), None), shutil.which("chromedriver")


@contextmanager
def started(chromium, driver, folder):
    """A Browser while the context lasts; what it writes stays in a folder."""
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"TMPDIR": str(folder)})  # fmt: skip
    try:
        port = next(found[1] for line in process.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        browser = Browser(f"http://127.0.0.1:{port}", chromium)
        yield browser
        browser.call("DELETE", "")
    finally:
        process.terminate()
        process.wait(10)
