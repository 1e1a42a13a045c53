# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: headless Chromium, driven over WebDriver, without a network."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthetic import HOSTILE, documents_row, thought, write_rows, write_run

from rlp_jax.report.page import write_comparison

pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
DESKTOP, PHONE = (1280, 900), (360, 740)
LAYOUT = "return [document.documentElement.scrollWidth, innerWidth]"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install 'rlp_jax[browser]'")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with its driver: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Browser:
    """A page that is open, and short names for what the tests do to it."""

    def __init__(self, driver, path: Path, size=DESKTOP, dark=False):
        width, height = size
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        self.driver = driver
        driver.get_log("browser")
        driver.get(path.resolve().as_uri())
        self.drawn()
        assert self.all("#viewer *") or self.all(".figure")

    def drawn(self):
        """Waits for two frames: what the page does when a size or a place changed is done by then."""
        self.js("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def wait_for(self, selector):
        """What the selector finds, as soon as there is some: a browser tells of an opened <details> in its own time."""
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, 30).until(lambda _: self.all(selector))

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.all(selector)[0]

    def texts(self, selector):
        return [node.text for node in self.all(selector)]

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key, key)).perform()

    def focus(self, selector):
        self.js("document.querySelector(arguments[0]).focus()", selector)

    def focused(self, name):
        return self.js("return document.activeElement.getAttribute(arguments[0])", name)

    def click(self, node):
        self.js("arguments[0].scrollIntoView({block: 'center'})", node)
        node.click()

    def nodes(self):
        return self.js("return document.querySelectorAll('*').length")

    def assert_clean(self):
        """Nothing was refused, nothing went wrong, nothing was asked for from anywhere."""
        assert self.driver.get_log("browser") == []
        assert self.js("return performance.getEntriesByType('resource').length") == 0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("browser") / "quickstart", documents=5)


@pytest.fixture(scope="module")
def report(run_dir):
    return write_comparison([run_dir], run_dir / "page.html")


def recorded(run_dir):
    """Rows before and after training, by document."""
    rows = [json.loads(line) for line in (run_dir / "documents.jsonl").read_text().splitlines()]
    return [[row for row in rows if row["document"] == number] for number in range(len(rows) // 2)]


def shown(value):
    return f"{value:+.3f}".replace("-", "−")


def test_curves_show_their_numbers(chromium, report, run_dir):
    page = Browser(chromium, report)
    names = [figure.get_attribute("id") for figure in page.all(".figure")]
    assert names[:3] == ["figure-gain", "figure-cross_entropy", "figure-accuracy"] and len(names) == 9
    svg = "#figure-gain .reading, #figure-gain svg[role=img]"
    assert page.one("#figure-gain svg[role=img]").get_attribute("aria-label").startswith("Information gain, held-out")
    assert len(page.all("#figure-gain .band")) == 3 and len(page.all("#figure-gain .curve")) == 6  # 3 in the legend
    page.focus("#figure-gain svg[role=img]")
    page.press("END", "ARROW_LEFT")
    (reading,) = page.texts("#figure-gain .reading")
    assert reading.startswith("step 50: thought 1.45 [1.33, 1.57] · empty thought") and svg
    page.click(page.one("#figure-gain .legend button"))
    assert page.one("#figure-gain .legend button").get_attribute("aria-pressed") == "false"
    assert len(page.all("#figure-gain .band")) == 2 and "thought 1.45" not in page.texts("#figure-gain .reading")[0]
    page.click(page.one("#figure-gain summary"))
    rows = [row.text.split() for row in page.wait_for("#figure-gain tbody tr")]
    assert len(rows) == 7 and rows[0][:2] == ["0", "−0.55"] and rows[-1][:2] == ["60", "1.85"]
    page.assert_clean()


def test_hovering_reads_the_nearest_step(chromium, report):
    from selenium.webdriver.common.action_chains import ActionChains

    page = Browser(chromium, report)
    svg = page.one("#figure-gain svg[role=img]")
    page.js("arguments[0].scrollIntoView({block: 'center'})", svg)
    ActionChains(chromium).move_to_element(svg).perform()
    assert page.texts("#figure-gain .reading")[0].startswith("step 30: ")


def test_tokens_are_tinted_by_the_gain_and_open_their_thoughts(chromium, report, run_dir):
    page = Browser(chromium, report)
    before, after = recorded(run_dir)[0]
    assert page.texts(".pane h3")[0].startswith("before training · mean ") and len(page.all(".pane")) == 2
    for number, row in enumerate((before, after)):
        tokens = page.all(f'[data-pane="{number}"]')
        assert len(tokens) == 19
        assert page.js("return arguments[0].closest('.document').textContent", tokens[0]) == "".join(row["tokens"])
        for token, gain in zip(tokens, row["gain"], strict=True):
            assert token.get_attribute("aria-label").endswith(f"gain {shown(gain)}")
            tint = page.js("return arguments[0].style.backgroundColor", token)
            assert ("--up" if gain >= 0 else "--down") in tint
    strength = page.js(
        "return [...document.querySelectorAll('[data-pane=\"0\"]')].map(n => getComputedStyle(n).backgroundColor)"
    )
    strength = [float(color.split("/")[1].strip(" )")) if "/" in color else 0.95 for color in strength]
    order = np.argsort(np.abs(before["gain"]))
    assert np.all(np.diff(np.array(strength)[order]) >= -1e-3)
    page.click(page.one('[data-pane="1"][data-t="7"]'))
    assert page.one(".panel").is_displayed() and len(page.all(".column")) == 2
    for column, row in zip(page.all(".column"), (before, after), strict=True):
        thoughts = sorted(row["thoughts"][6], key=lambda one: -one["reward"])
        assert "log p = −2.000, an empty one gains +0.250" in column.text
        for node, one in zip(column.find_elements("css selector", ".thought"), thoughts, strict=True):
            tags, text = (node.find_element("css selector", f".{name}").text for name in ("tags", "text"))
            assert shown(one["reward"]) in tags and f"advantage {shown(one['advantage'])}" in tags
            assert "".join(text.split()) == "".join("".join(one["tokens"]).split())
    token = page.one(".column .thought .token")
    page.js("arguments[0].dispatchEvent(new PointerEvent('pointerenter'))", token)
    best = max(before["thoughts"][6], key=lambda one: one["reward"])
    for name in ("ratio_ema", "ratio_sampler", "logprob"):
        assert f"{best[name][0]:+.4f}".replace("-", "−") in page.one(".panel .status").text
    page.assert_clean()


def test_by_keyboard_alone(chromium, report, run_dir):
    page = Browser(chromium, report)
    page.focus(".list")
    page.press("ARROW_DOWN", "ARROW_DOWN")
    assert page.one('.row[aria-selected="true"]').get_attribute("aria-posinset") == "3"
    assert page.focused("aria-activedescendant") == "document-2"
    assert page.js("return document.querySelector('.document').textContent") == "".join(
        recorded(run_dir)[2][0]["tokens"]
    )
    for _ in range(20):  # past the choices, by Tab, to the document's one token in that order
        page.press("TAB")
        if page.focused("data-t"):
            break
    assert page.focused("data-t") == "1"
    page.press("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT", "END", "HOME", "ARROW_RIGHT")
    assert page.focused("data-t") == "2" and page.one(".status").text.startswith("token 2 ")
    assert page.js("return document.activeElement.matches(':focus-visible')")
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.press("ENTER")
    assert page.one(".panel").is_displayed() and page.focused("aria-label") == "thoughts"
    assert page.one('[data-t="2"]').get_attribute("aria-pressed") == "true"
    page.press("ESCAPE")
    assert not page.one(".panel").is_displayed() and page.focused("data-t") == "2"
    page.press("ARROW_DOWN")  # the nearest token of the line below
    below = int(page.focused("data-t"))
    assert below > 2
    page.press("ARROW_UP")
    assert abs(int(page.focused("data-t")) - 2) <= 1
    page.press("TAB", "TAB")
    page.assert_clean()


def test_choosing_what_is_shown(chromium, report, run_dir):
    page = Browser(chromium, report)
    before, after = page.all(".choices .group button")
    page.click(before)
    assert before.get_attribute("aria-pressed") == "false" and len(page.all(".pane")) == 1
    page.click(after)  # something has to be shown
    assert after.get_attribute("aria-pressed") == "true" and len(page.all(".pane")) == 1
    page.js("const s = document.querySelector('[aria-label=\"tint documents by\"]'); s.value = 'content';"
            "s.dispatchEvent(new Event('change'))")  # fmt: skip
    gain = recorded(run_dir)[0][1]["gain"][0] - 0.25
    assert page.one("[data-t]").get_attribute("aria-label").endswith(f"gain over an empty thought {shown(gain)}")
    page.js("const s = document.querySelector('[aria-label=\"order of documents\"]'); s.value = 'gain';"
            "s.dispatchEvent(new Event('change'))")  # fmt: skip
    chips = [float(text.replace("−", "-")) for text in page.texts(".row .chip")]
    assert len(chips) == 5 and chips == sorted(chips, reverse=True)
    page.focus(".finder input")
    page.press(*"no such words")
    assert page.texts(".count") == ["0 of 5 documents"] and page.all(".row") == []
    page.assert_clean()


def test_several_runs_side_by_side(chromium, run_dir, tmp_path):
    other = write_run(tmp_path / "other", name="other", documents=2)
    page = Browser(chromium, write_comparison([run_dir, other], tmp_path / "all.html"))
    assert [title.split(" ·")[0] for title in page.texts(".pane h3")] == [
        "quickstart, after training",
        "other, after training",
    ]
    assert [button.text for button in page.all("#figure-gain .legend button")][::3] == [
        "quickstart: thought", "other: thought",
    ]  # fmt: skip
    colors = page.js("return [...document.querySelectorAll('#figure-entropy .canvas .curve, #figure-entropy .curve')]"
                     ".map(n => getComputedStyle(n).stroke)")  # fmt: skip
    assert len(set(colors)) == 2
    page.click(page.one('[data-pane="1"][data-t="3"]'))
    assert len(page.all(".column")) == 2
    page.assert_clean()


@pytest.mark.parametrize(("size", "dark"), [(PHONE, False), (PHONE, True), (DESKTOP, True)])
def test_on_a_phone_and_in_the_dark(chromium, report, size, dark):
    page = Browser(chromium, report, size, dark)
    page.click(page.one("[data-t]"))
    assert page.one(".panel").is_displayed()
    width, room = page.js(LAYOUT)
    assert width <= room  # nothing makes the page scroll sideways
    luminance = """
      const part = (c) => (c /= 255, c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
      const of = (color) => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(part); return .2126 * r + .7152 * g + .0722 * b; };
      const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
      const over = (...colors) => { for (const c of colors) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); } return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)})`; };
      return [...document.querySelectorAll(".document [data-t], .soft, .chip, .legend button, summary")].map((node) => {
        const behind = [];
        for (let n = node; n; n = n.parentElement) behind.unshift(getComputedStyle(n).backgroundColor);
        const [a, b] = [of(over(...behind)), of(getComputedStyle(node).color)];
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      });
    """  # noqa: E501
    ratios = page.js(luminance)
    assert len(ratios) > 40 and min(ratios) >= 4.5  # WCAG AA, on the strongest tint too
    ground = page.js("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 24, 29)") == dark
    page.assert_clean()


def test_hostile_text_is_text(chromium, tmp_path):
    run_dir, rng = write_run(tmp_path / "run"), np.random.default_rng(0)
    long = "x<b>" * 25_000
    row = documents_row(0, HOSTILE, rng, tokens=4)
    row["tokens"] = [HOSTILE, HOSTILE, "\u202eright to left\u2067", "\u0633\u0644\u0627\u0645"]
    row["thoughts"][0] = [
        thought(rng, [HOSTILE, "\x00", long], rest=HOSTILE, reward=9.0),
        thought(rng, [], reward=-9.0),
    ]
    write_rows(run_dir / "documents.jsonl", [row])
    rows = [json.loads(line) for line in (run_dir / "thoughts.jsonl").read_text().splitlines()]
    for training in rows:
        training["prefix"] = training["target"] = HOSTILE
        for one in training["thoughts"]:
            one["text"] = HOSTILE
    write_rows(run_dir / "thoughts.jsonl", rows)
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"name": HOSTILE}))
    page = Browser(chromium, write_comparison([run_dir], tmp_path / "page.html"))
    seen = HOSTILE
    for character in "\u2028\u2029\u202e\u2066\ud800\x00":
        seen = seen.replace(character, f"⟨U+{ord(character):04X}⟩")
    assert page.js("return document.title") == f"{seen} · RLP"
    assert page.js("return document.querySelector('h1').textContent") == seen
    assert page.js("return document.querySelector('.document').textContent") == (
        f"{seen}{seen}⟨U+202E⟩right to left⟨U+2067⟩\u0633\u0644\u0627\u0645"
    )
    page.click(page.one('[data-t="1"]'))
    text = page.js("return document.querySelector('.column .thought .text').textContent")
    assert text.startswith(f"{seen}⟨U+0000⟩x<b>x<b>") and len(text) < 4100
    page.click(page.one(".column .more"))
    text = page.js("return document.querySelector('.column .thought .text').textContent")
    assert text == f"{seen}⟨U+0000⟩{long}{seen}"
    assert page.texts(".column .thought .text")[1].strip() == "(empty)"
    assert page.js("return window.broken === undefined")
    assert page.js("return document.querySelectorAll('img, iframe, object, embed, svg[onload], b.x').length") == 0
    assert page.js("return document.querySelectorAll('script').length") == 3
    page.assert_clean()


def test_the_page_refuses_script_and_markup_from_strings(chromium, report):
    """What would happen if something got through: the policy stops it."""
    page = Browser(chromium, report)
    for attempt in ("document.body.innerHTML = '<img src=x onerror=window.broken=1>'", "document.write('x')",
                    "document.body.setAttribute('onclick', 'window.broken=2')"):  # fmt: skip
        refused = page.js(f"try {{ {attempt}; return '' }} catch (error) {{ return error.name }}")
        assert refused == "TypeError", attempt
    page.js("const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i)")
    assert page.js("return window.broken === undefined")
    assert sum("Content Security Policy" in entry["message"] for entry in chromium.get_log("browser")) >= 1


def test_two_thousand_documents(chromium, tmp_path):
    run_dir = write_run(tmp_path / "run", documents=2000, tokens=12, every=6, group=1)
    page = Browser(chromium, write_comparison([run_dir], tmp_path / "page.html"))
    few = page.nodes()
    assert page.texts(".count") == ["2000 of 2000 documents"]
    assert len(page.all(".row")) < 40 and few < 2500
    page.focus(".list")
    page.press("END")
    assert page.one('.row[aria-selected="true"]').get_attribute("aria-posinset") == "2000"
    assert page.one('.row[aria-selected="true"]').is_displayed()
    text = page.js("return document.querySelector('.document').textContent")
    with open(run_dir / "documents.jsonl") as file:
        last = json.loads(next(itertools.islice(file, 1999, None)))
    assert text == "".join(last["tokens"])
    for part in (0.1, 0.9, 0.5):  # scrolled about: rows come and go
        page.js("const l = document.querySelector('.list'); l.scrollTop = l.scrollHeight * arguments[0]", part)
        page.drawn()
        places = [int(row.get_attribute("aria-posinset")) for row in page.all(".row")]
        assert min(places) < 2000 * part + 2 < max(places) and len(places) < 40
    page.click(page.all(".row")[12])
    assert page.one('.row[aria-selected="true"]').get_attribute("aria-posinset") == str(places[12])
    page.click(page.one("[data-t]"))
    assert page.one(".panel").is_displayed()
    page.focus(".finder input")
    page.press("r", "i", "v")
    found = int(page.texts(".count")[0].split()[0])
    assert 0 < found < 2000
    assert page.nodes() < few + 500
    page.assert_clean()


def test_without_documents_and_without_a_step(chromium, tmp_path):
    run_dir = write_run(tmp_path / "run")
    page = Browser(chromium, write_comparison([run_dir], tmp_path / "page.html"))
    assert page.all("#viewer") == [] and page.texts("h2").count("Thoughts") == 1
    page.assert_clean()
