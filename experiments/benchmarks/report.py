# SPDX-License-Identifier: Apache-2.0
"""How the report's viewer does with many documents, in headless Chromium: size of the page, time until it is there,
nodes in it, and how long a click, a search and a scroll hold it up.

    pip install 'rlp_jax[browser]', chromium and chromedriver on the path
    python experiments/benchmarks/report.py --documents 2000
"""

import argparse
import dataclasses
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

from rlp_jax.config import Config, to_json
from rlp_jax.report.page import render
from rlp_jax.report.run import read_run

WORDS = ("the", "river", "ran", "north", "past", "seven", "mills", "and", "nobody", "there", "counted", "them")
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
# Timed from the action to the second frame after it, which shows what it did.
ACTIONS = {
    "open a document": "document.querySelector('.list').dispatchEvent(new KeyboardEvent('keydown', {key: 'PageDown'}))",
    "open the last one": "document.querySelector('.list').dispatchEvent(new KeyboardEvent('keydown', {key: 'End'}))",
    "show thoughts": "document.querySelector('[data-t]').click()",
    "scroll the list": "const l = document.querySelector('.list'); l.scrollTop = l.scrollHeight / 2",
    "sort": "const s = document.querySelector('[aria-label=\"order of documents\"]'); s.value = 'change';"
    " s.dispatchEvent(new Event('change'))",
    "search": "const i = document.querySelector('.finder input'); i.value = 'river ran';"
    " i.dispatchEvent(new Event('input'))",
    "search again": "const i = document.querySelector('.finder input'); i.value = 'seven mills';"
    " i.dispatchEvent(new Event('input'))",
}


def write_run(directory: Path, documents: int, tokens: int, positions: int, thoughts: int, length: int) -> None:
    """A run whose documents are made up."""
    draw = random.Random(0)
    (directory / "config.json").write_text(to_json(dataclasses.replace(Config(), name="made up", steps=100)))

    def numbers(count):
        return [round(draw.gauss(0, 1), 4) for _ in range(count)]

    def thought():
        columns = {name: numbers(length) for name in ("logprob", "ratio_ema", "ratio_sampler")}
        return {
            "tokens": [f" {draw.choice(WORDS)}" for _ in range(length)], "rest": "", "length": length, "stopped": True,
            "close": 0, "reward": draw.gauss(0, 1), "advantage": draw.gauss(0, 1), **columns,
        }  # fmt: skip

    with open(directory / "documents.jsonl", "w") as file:
        for document in range(documents):
            text = [f" {draw.choice(WORDS)}" for _ in range(tokens)]
            for step in (0, 100):
                position = sorted(draw.sample(range(1, tokens), positions))
                row = {
                    "step": step, "document": document, "horizon": 1, "tokens": text, "position": position,
                    "s_ema": numbers(positions), "gain": numbers(positions), "gain_empty": numbers(positions),
                    "thoughts": [[thought() for _ in range(thoughts)] for _ in position],
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")


def measure(page: Path, profile: str) -> dict[str, float]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.get(page.resolve().as_uri())
        timing = "const t = performance.getEntriesByType('navigation')[0]; return t.domComplete - t.startTime"
        found = {"until it is there, ms": driver.execute_script(timing)}
        found["nodes"] = driver.execute_script("return document.querySelectorAll('*').length")
        for name, action in ACTIONS.items():
            found[f"{name}, ms"] = driver.execute_async_script(
                f"const done = arguments[0], start = performance.now(); {{ {action} }}"
                "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)))"
            )
        found["nodes after"] = driver.execute_script("return document.querySelectorAll('*').length")
        return found
    finally:
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("documents", 2000), ("tokens", 256), ("positions", 8), ("thoughts", 4), ("length", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        directory, page = Path(folder), Path(folder) / "report.html"
        write_run(directory, **args)
        began = time.perf_counter()
        page.write_text(render([read_run(directory)]), encoding="utf-8")
        result = {**args, "seconds to write": time.perf_counter() - began, "megabytes": page.stat().st_size / 1e6}
        result |= measure(page, f"{folder}/profile")
    for name, value in result.items():
        print(f"{name:24} {value:10.1f}" if isinstance(value, float) else f"{name:24} {value:8}")


if __name__ == "__main__":
    main()
