"""The page of a report in a browser: words are shown as they stand, and maps are those of the numbers behind them."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from s3dit import Pipeline
from s3dit.research.report import look

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--hide-scrollbars", "--virtual-time-budget=3000", "--host-resolver-rules=MAP * ~NOTFOUND")  # fmt: skip
# Two stars, markup, an emoji of two UTF-16 units before the last word.
PROMPT = "a <b>red</b> star above 🦊 a blue star"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A function that opens a page with an option -> what Chromium prints."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)} is on the path")
    profile = tmp_path_factory.mktemp("profile")

    def run(*words):
        command = [program, *OPTIONS, f"--user-data-dir={profile}", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    if (tried := run("--version")).returncode:
        pytest.skip(f"{program} does not run here: {tried.stderr.strip()[:200]}")
    return run


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    seen = look(pipe, PROMPT, concepts=["star", "a blue star"], seed=7, num_inference_steps=3, height=96, width=128)
    return seen, seen.save(tmp_path_factory.mktemp("report"))


def opened(browser, page, at="", script=""):
    """The page's elements after loading it, and after a script of the test's that acts as a reader would."""
    if script:
        text = page.read_text(encoding="utf-8")
        page = page.with_name("acted.html")
        page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = browser("--dump-dom", f"{page.as_uri()}{at}")
    assert 'data-ready="yes"' in done.stdout, done.stderr[-2000:]
    # The data come back too.
    return re.sub(r'(id="data">).*?</script>', r"\1</script>", done.stdout, flags=re.S)


def shown(dom):
    """What the page says of the map, and the name of the pressed word."""
    says = re.sub("<[^>]*>", "", re.search(r'<div id="says"[^>]*>(.*?)</div>', dom, re.S)[1])
    pressed = re.findall(r'<button[^>]*data-column="(-?\d+)"[^>]*aria-pressed="true"', dom)
    return html.unescape(says), [int(column) for column in pressed]


def percent(says):
    """The mean weight that the page says, in percent of three digits."""
    return float(re.search(r": ([\d.e+-]+) % of what the image looks at, ", says)[1])


@pytest.mark.slow
def test_words_are_buttons_and_texts_are_texts(browser, written):
    seen, page = written
    dom = opened(browser, page)
    (prompt,) = re.findall(r'<div id="prompt"[^>]*>(.*?)</div>', dom, re.S)
    assert html.unescape(re.sub("</?button[^>]*>", "", prompt)) == PROMPT
    words = re.findall(r"<button[^>]*>([^<]*)</button>", prompt)
    assert words == ["a", "b", "red", "b", "star", "above", "a", "blue", "star"]
    assert words == [column.name for column in seen.columns if column.kind == "word"]
    assert html.unescape(re.search("<title>(.*?)</title>", dom)[1]) == PROMPT
    assert shown(dom) == ("No word is chosen.", [])
    for name in ("steps", "layers"):
        (strip,) = re.findall(rf'<div class="strip[^"]*" id="{name}">(.*?)</div>', dom, re.S)
        assert strip.count("<canvas") == len(seen.steps if name == "steps" else seen.layers)
    assert dom.count('alt="estimate of the image') == 3
    assert "aria-label" in dom and "Share of the velocity" in dom and dom.count("<table") >= 5


@pytest.mark.slow
def test_the_address_chooses_a_word_a_layer_a_step_and_a_head(browser, written):
    seen, page = written
    says, pressed = shown(opened(browser, page, "#word=4&layer=3&step=2"))
    share = 100 * seen.tensors["share.by_layer_and_step"][4, 3, 1].item()
    assert pressed == [4] and says.startswith("“star”: ") and "at, layers.3, step 2; " in says
    assert percent(says) == pytest.approx(share, rel=6e-3)
    says, pressed = shown(opened(browser, page, "#word=8&layer=5&head=1"))
    share = 100 * seen.tensors["share.by_layer_and_head"][8, 5, 1].item()
    assert pressed == [8] and "at, layers.5, head 1, all steps; " in says
    assert percent(says) == pytest.approx(share, rel=6e-3)
    # What is not there chooses nothing.
    assert shown(opened(browser, page, "#word=99&layer=x&head=1"))[0] == "No word is chosen."


@pytest.mark.slow
def test_maps_are_the_numbers_behind_them(browser, written):
    """Decoded by the page, and averaged over what is not chosen: within half of a level of 255 of each map's range."""
    seen, page = written
    script = """const out = [[4, null, null, null], [4, 3, 1, null], [8, 2, null, 4], [8, null, 2, null],
    [4, 1, null, null], [NORM, 3, 0, null],
    [NORM - 2, 3, null, null]].map(at => { const m = map(...at); return {...m, values: [...m.values]}; });
    document.body.dataset.maps = JSON.stringify(out);"""
    found = json.loads(html.unescape(re.search(r'data-maps="([^"]*)"', opened(browser, page, "", script))[1]))
    names = ("attention", "attention.by_layer_and_step", "attention.by_layer_and_head", "residual.norm")
    whole, by_step, by_head, norms = (seen.tensors[name] for name in names)
    concepts = seen.tensors["concept.by_layer_and_step"]
    cases = [(whole[4], whole[4:5]), (by_step[4, 3, 1], by_step[4, 3, 1:2]),
             (by_head[8, 2, 4], by_head[8, 2, 4:5]),
             (by_step[8, :, 2].mean(0), by_step[8, :, 2]), (by_step[4, 1].mean(0), by_step[4, 1]),
             (norms[3, 0], norms[3, :1]), (concepts[1, 3].mean(0), concepts[1, 3])]  # fmt: skip
    for got, (expected, parts) in zip(found, cases, strict=True):
        assert (got["rows"], got["columns"]) == tuple(expected.shape)
        ranges = parts.amax((-2, -1)) - parts.amin((-2, -1))
        bound = ranges.mean().item() / 509
        worst = max(abs(a - b) for a, b in zip(got["values"], expected.flatten().tolist(), strict=True))
        assert worst <= bound + 1e-6 * expected.abs().max().item()


def test_pointing_clicking_and_keys(browser, written):
    """Pointing shows a word for the moment, a click keeps it; arrow keys walk through heads, Enter takes one."""
    seen, page = written
    script = """const wait = () => new Promise(done => setTimeout(done, 20));
    (async () => {
      const words = document.querySelectorAll("#prompt button"), heard = [];
      const note = () => heard.push([$("says").textContent, location.hash]);
      words[2].dispatchEvent(new PointerEvent("pointerenter")); await wait(); note();
      words[2].dispatchEvent(new PointerEvent("pointerleave")); await wait(); note();
      words[7].click(); await wait(); note();
      words[2].focus(); await wait(); note();
      words[2].blur(); await wait(); note();
      const cell = document.querySelector("#head-table td");
      cell.focus();
      for (const key of ["ArrowDown", "ArrowDown", "ArrowRight", "Enter"])
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
      await wait(); note();
      $("step").value = 2; $("step").dispatchEvent(new Event("input")); await wait(); note();
      document.body.dataset.heard = JSON.stringify(heard);
    })();"""
    heard = json.loads(html.unescape(re.search(r'data-heard="([^"]*)"', opened(browser, page, "", script))[1]))
    says, places = zip(*heard, strict=True)
    assert [text.partition(":")[0] for text in says] == [
        "“red”", "No word is chosen.", "“blue”", "“red”", "“blue”", "“blue”", "“blue”",
    ]  # fmt: skip
    assert places[2:5] == ("#word=7",) * 3 and places[5] == "#word=7&layer=2&head=1"
    assert places[6] == "#word=7&layer=2&step=2" and "layers.2, step 2" in says[6]
    share = 100 * seen.tensors["share.by_layer_and_head"][7, 2, 1].item()
    assert percent(says[5]) == pytest.approx(share, rel=6e-3) and "layers.2, head 1" in says[5]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_a_screenshot_shows_picture_and_map(browser, written, tmp_path, scheme):
    """The map is over the picture: within its place colors differ from those without a map."""
    _, page = written
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    shots = []
    for at in ("", "#word=4"):
        shot = tmp_path / f"shot{len(shots)}.png"
        browser(*dark, "--window-size=1000,900", f"--screenshot={shot}", f"{page.as_uri()}{at}")
        shots.append(Image.open(shot).convert("RGB"))
    plain, mapped = shots
    assert plain.size == (1000, 900)
    paper = plain.getpixel((3, 500))
    assert max(paper) < 64 if scheme == "dark" else min(paper) > 240
    # The stage begins at the left margin, and is square or wider.
    box = (30, 200, 400, 500)
    different = sum(a != b for a, b in zip(plain.crop(box).getdata(), mapped.crop(box).getdata(), strict=True))
    assert different > 0.5 * 370 * 300
    assert len(set(plain.crop(box).getdata())) > 500
