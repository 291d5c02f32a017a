"""The web page in a browser, by clicks and keys: what it sends, what it shows, what it keeps."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from page_server import EVIL, Server
from PIL import Image
from webdriver import CONTROL, DELETE, ENTER, ESCAPE, NAMES, RIGHT, TAB, programs, started

from s3dit.inputs.image_metadata import carried
from s3dit.serve import door, page

# What the pictures of the gallery show, as texts.
PIXELS = """return Promise.all([...document.querySelectorAll("#tiles img")].map(async image => {
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL();
}))"""


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    chromium, driver = programs()
    if chromium is None or driver is None:
        pytest.skip(f"no browser is installed: needed chromedriver and one of {', '.join(NAMES)} on the path")
    # A short path: that of a socket in it may have 107 bytes.
    folder = tmp_path_factory.mktemp("c")
    try:
        with started(chromium, driver, folder) as browser:
            yield browser
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    chrome.call("POST", "/url", url=server.address)
    chrome.until("!document.getElementById('form').hidden && document.title")
    yield chrome
    # A page that draws asks whether it may be left.
    server.go.set()
    chrome.run("document.querySelectorAll('.job .line button').forEach(e => e.click())")
    chrome.devtools("Emulation.clearDeviceMetricsOverride")
    chrome.devtools("Emulation.setEmulatedMedia", features=[])
    assert not chrome.complaints()


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


@pytest.mark.slow
def test_a_picture_forms_and_arrives(browser, server):
    browser.type("#prompt", "a slow <b>red</b> star")
    browser.type("#seed", "7")
    browser.click("[data-size='160x96']")
    browser.type("#field-num_inference_steps", "5")
    before = browser.box("#stage")
    browser.press(CONTROL, ENTER)
    browser.until("document.querySelector('.job .photo img')?.complete")
    assert browser.text(".job .says") == "step 3 of 8"
    assert browser.run("return document.title") == "3/8 · s3dit"
    photo = browser.box(".job .photo")
    assert photo["width"] / photo["height"] == pytest.approx(160 / 96, rel=0.01)
    during = browser.box(".job")
    server.go.set()
    browser.tiles(1)
    # Nothing moved when pictures came.
    assert browser.box(".job") == during
    assert browser.box("#stage") == before
    assert re.fullmatch(r"finished in \d+\.\d s · (a note ?)+", browser.text(".job .says"))
    ((path, fields, files),) = server.asked
    assert path == "/v1/images/generations" and not files
    assert fields == {
        "prompt": "a slow <b>red</b> star", "size": "160x96", "num_inference_steps": 5, "seed": 7,
        "n": 1, "stream": True, "partial_images": 3, "progress": True,
    }  # fmt: skip


@pytest.mark.slow
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


@pytest.mark.slow
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
    browser.until("!document.getElementById('painter').open")
    assert browser.seen("#mask-remove")
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


@pytest.mark.slow
def test_loras_references_and_guidance(browser, server):
    browser.click("#lora-group summary")
    assert browser.text(".lora .tick") == EVIL and not browser.seen(".lora b")
    # One acts by itself, at a half; without a tick it rests.
    assert browser.value(".lora input[type=number]") == "0.5" and browser.text("#lora-badge") == "1"
    browser.click(".lora input[type=checkbox]")
    browser.click(".lora:nth-child(2) input[type=checkbox]")
    browser.type(".lora:nth-child(2) input[type=number]", "0.7")
    assert not browser.seen("#negative_prompt")
    browser.type("#field-guidance_scale", "3.5")
    browser.type("#negative_prompt", "blur")
    browser.type("#prompt", "a ring")
    browser.press(CONTROL, ENTER)
    browser.tiles(1)
    _, fields, _ = server.asked[-1]
    assert fields["lora"] == [{"name": EVIL, "scale": 0}, {"name": "ink", "scale": 0.7}]
    assert (fields["guidance_scale"], fields["negative_prompt"]) == (3.5, "blur")
    browser.click("#reference-group summary")
    for color in ("red", "green", "blue"):
        give(browser, "#reference-file", png(Image.new("RGB", (32, 32), color)))
    browser.until("document.querySelectorAll('#references figure').length === 2")
    assert "2 pictures at most" in browser.text("#toast")
    browser.press(CONTROL, ENTER)
    browser.tiles(2)
    path, fields, files = server.asked[-1]
    assert path.endswith("edits") and len(files["reference"]) == 2 and fields["lora"][1]["name"] == "ink"


@pytest.mark.slow
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
    assert "a note" in browser.text("#view-facts")
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


@pytest.mark.slow
def test_a_picture_from_elsewhere_brings_its_settings(browser):
    metadata = {"prompt": "from elsewhere", "width": 64, "height": 96, "seed": 2**63 - 1, "shift": 3.0,
                "sigmas": [1, 0.5], "region": [{}], "engine": {}, "solver": "heun",
                "adapters": [{"file": "/elsewhere/other.safetensors", "scale": 1}]}  # fmt: skip
    places = ("field-width", "field-height", "seed", "field-sigmas", "field-shift")
    for form in ("PNG", "JPEG", "WEBP"):
        out = io.BytesIO()
        Image.new("RGB", (64, 96)).save(out, form, **carried(metadata | {"prompt": form}, (64, 96), form))
        give(browser, "#image-file", out.getvalue(), form)
        browser.until("document.querySelector('#toast button')?.innerText === 'Use its settings'")
        browser.click("#toast button")
        browser.until("document.getElementById('prompt').value === arguments[0]", form)
        found = [browser.value(f"#{name}") for name in places]
        assert found == ["64", "96", str(2**63 - 1), "1,0.5", ""] and browser.value("#field-solver") == '"heun"'
        # What the form has no place for is said; the LoRA that acts by itself was not there.
        assert browser.text("#toast span").endswith("does not draw with: Region, LoRA.")
        assert browser.text("#lora-badge") == ""
    give(browser, "#image-file", b"no picture")
    browser.until("document.getElementById('toast').innerText.includes('cannot be read')")


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_key_is_asked_for(chrome, server):
    server.key = "secret"
    chrome.call("POST", "/url", url=server.address)
    chrome.until("document.getElementById('key-dialog').open")
    chrome.type("#key", "wrong" + ENTER)
    chrome.until("document.getElementById('key-wrong').checkVisibility()")
    chrome.type("#key", "secret" + ENTER)
    chrome.until("!document.getElementById('form').hidden")
    assert chrome.run("return localStorage.getItem('s3dit.key') ?? sessionStorage.getItem('s3dit.key')") == "secret"


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_narrow_screen_light_and_dark(browser, server, tmp_path):
    browser.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    give(browser, "#image-file", png(Image.new("RGB", (300, 200), "teal")))
    browser.type("#prompt", "a ring")
    browser.click("#draw")
    browser.tiles(1)
    assert server.asked[-1][1]["strength"] == "0.6"
    browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.run("return document.documentElement.scrollWidth") == 360
    for opener, window in (("#paint", "#painter"), (".tile", "#viewer")):
        browser.click(opener)
        browser.until("document.querySelector(arguments[0]).open", window)
        box = browser.box(window)
        assert box["left"] >= 0 and box["right"] <= 360
        browser.press(ESCAPE)
    browser.run("scrollTo(0, 0)")
    for scheme in ("light", "dark"):
        browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        paper = browser.shot(tmp_path / "shot.png").getpixel((3, 300))
        assert max(paper) < 64 if scheme == "dark" else min(paper) > 230


@pytest.mark.slow
def test_with_the_server_itself(chrome, served):
    """The embedded model draws, redraws what a mask marks, refuses, and a picture is drawn again the same."""
    chrome.call("POST", "/url", url=served.url)
    chrome.until("!document.getElementById('form').hidden")
    chrome.click("#example")
    for name, value in (("width", "64"), ("height", "64"), ("num_inference_steps", "3")):
        chrome.type(f"#field-{name}", value)
    chrome.press(CONTROL, ENTER)
    chrome.tiles(1)
    chrome.click(".tile")
    chrome.click("#view-use")
    chrome.press(CONTROL, ENTER)
    chrome.tiles(2)
    one, other = chrome.run(PIXELS)
    assert one == other
    chrome.click(".cover")
    chrome.click("#view-start")
    chrome.click("#paint")
    chrome.drag("#mask", (0.3, 0.3), (0.7, 0.7))
    chrome.click("#paint-done")
    chrome.until("!document.getElementById('painter').open")
    chrome.press(CONTROL, ENTER)
    chrome.tiles(3)
    chrome.type("#field-strength", "0")
    chrome.press(CONTROL, ENTER)
    chrome.until("document.querySelector('[data-field=strength] .wrong')")


def test_the_page_asks_nothing_of_others():
    """No address of elsewhere, no markup made of texts, no code in the document: nothing that the policy forbids."""
    files = page.files()
    assert set(files) >= {"/", "/page.css", "/main.js"}
    for name, (data, _) in files.items():
        text = data.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\binnerHTML|outerHTML|insertAdjacentHTML|\beval\(|document\.write", text), name
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", files["/"][0].decode())


@pytest.mark.slow
def test_the_server_gives_the_files(served):
    """Without a key, which the page asks for itself, and under a policy that lets nothing else run."""
    for path, (content, kind) in page.files().items():
        status, headers, body = served.ask("GET", path)
        assert (status, body) == (200, content) and headers["Content-Type"].startswith(kind)
        assert "script-src 'self'; style-src 'self';" in headers["Content-Security-Policy"]
    assert set(page.files()) <= set(door.OPEN)
