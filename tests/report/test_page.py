"""The report of a synthetic run directory: what is there is shown, what is missing is not, nothing in it is trusted."""

import dataclasses
import html.parser
import json
import math
import re

import numpy as np
import pytest

from rlp_jax.config import Config, to_json
from rlp_jax.report.figures import PAGE_COLORS, draw_figures
from rlp_jax.report.page import sample_thoughts, verdict, write_report
from rlp_jax.report.run import ReportError, number, read_run

HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}{% raw %}&amp;\"'\u202eabc\ud800\x00"
FIGURES = ["accuracy", "cross_entropy", "entropy", "gain", "grad_norm", "ratio", "reward", "speed", "thoughts"]


def metrics_row(step, steps, rng):
    done = step / steps
    return {
        "step": step, "loss": 0.0, "reward_mean": -0.5 + 2 * done + 0.2 * rng.normal(), "reward_std": 1.2 - 0.6 * done,
        "thought_len": 20 - 6 * done + rng.normal(), "stop_rate": 0.6 + 0.35 * done, "entropy": 1.2 * math.exp(-done),
        "clip_fraction": 0.0, "logprob_gap": 1e-6 * (1 + rng.random()), "grad_norm": 2 * math.exp(-done) + rng.random(),
        "kl": 0.0, "finite": 1.0, "sampled_tokens_per_s": 900 + 50 * rng.random(),
        "learner_tokens_per_s": 2500 + 90 * rng.random(), "seconds": 4.0, "seconds_data": 0.1, "seconds_sample": 2.5,
        "seconds_learn": 1.4, "learning_rate": 1e-5, "skipped": 0, "warnings": [],
    }  # fmt: skip


def eval_row(done):
    gain = -0.55 + 2.4 * done
    row = {
        "gain": gain, "gain_empty": -0.4 + 0.2 * done, "gain_shuffled": -1.1 + 0.3 * done,
        "ce_think": 2.2 - 1.9 * done, "ce_no_think": 1.65 + 0.5 * done, "ce_empty": 2.05 + 0.2 * done,
        "ce_shuffled": 2.7 + 0.2 * done, "ce_no_think_policy": 1.65 + 0.6 * done,
        "acc_think": 0.43 + 0.5 * done, "acc_no_think": 0.14,
        "thought_len": 20 - 6 * done, "stop_rate": 0.6 + 0.35 * done, "documents": 64,
    }  # fmt: skip
    row |= {"gain_over_empty": gain - row["gain_empty"], "gain_over_shuffled": gain - row["gain_shuffled"]}
    return row | {f"{key}_ci95": [row[key] - 0.12, row[key] + 0.12] for key in [k for k in row if k.startswith("gain")]}


def thoughts_row(step, document, rng, text="the states on the way: c, a, f"):
    reward_G = rng.normal(size=4) + step / 30
    return {
        "step": step, "document": document, "target": " red",
        "prefix": f"Document {document}. " + "It was a long story. " * 40 + "so it is",
        "s_ema": -2.1,
        "thoughts": [
            {"text": f"{text} ({i})", "reward": float(r), "advantage": float(r - reward_G.mean()), "length": 12 + i,
             "stopped": i != 2} for i, r in enumerate(reward_G)
        ],
    }  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path):
    """A finished run of 60 steps."""
    rng, steps, directory = np.random.default_rng(0), 60, tmp_path / "quickstart"
    directory.mkdir()
    config = dataclasses.replace(Config(), name="quickstart", model="compose-0.6m", steps=steps, batch_documents=32)
    (directory / "config.json").write_text(to_json(config))
    write_rows(directory / "metrics.jsonl", [metrics_row(step, steps, rng) for step in range(1, steps + 1)])
    write_rows(directory / "eval.jsonl", [{"step": step} | eval_row(step / steps) for step in range(0, steps + 1, 10)])
    documents = [(step, document) for step in (1, 30, 60) for document in ((7, 8) if step != 60 else (9, 8, 7))]
    write_rows(directory / "thoughts.jsonl", [thoughts_row(step, document, rng) for step, document in documents])
    (directory / "summary.json").write_text(json.dumps({"before": eval_row(0), "after": eval_row(1)}))
    return directory


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def edit_rows(path, change):
    write_rows(path, [change(json.loads(line)) or json.loads(line) for line in path.read_text().splitlines()])


def test_a_finished_run(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert sorted(p.stem for p in (run_dir / "figures").glob("*")) == sorted(FIGURES)
    for png in (run_dir / "figures").glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and png.stat().st_size > 5000
    page = read(path)
    assert sum(tag == "svg" for tag, _ in page.tags) == len(FIGURES)
    for expected in (
        "After training, thinking pays: +1.850 nats a token (before: −0.550) on held-out text, clearly above zero and",
        "compose-0.6m · 32 documents a batch · 16 thoughts a position",
        "60 of 60 steps",
        "−0.550", "+1.730 to +1.970", "+2.400", "93.0%", "+50.0 points",
        "Control: empty thought", "Control: shuffled thought",
        "the states on the way", " red", "cut at the cap", '"group_size": 16',
    ):  # fmt: skip
        assert expected in page.text
    assert "Warnings" not in page.text
    assert list(run_dir.glob(".*")) == [] and list((run_dir / "figures").glob(".*")) == []


def test_the_page_is_one_offline_file_without_scripts(run_dir):
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:")), (tag, value)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert len(text) < 1_500_000


def test_untrusted_text_stays_text(run_dir):
    def poison(row):
        row["prefix"] = row["target"] = row["document"] = HOSTILE
        for thought in row["thoughts"]:
            thought["text"] = HOSTILE
        return row

    edit_rows(run_dir / "thoughts.jsonl", poison)
    edit_rows(run_dir / "metrics.jsonl", lambda row: row | {"warnings": [HOSTILE]})
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"name": HOSTILE, "model": HOSTILE}))
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    # in title, heading, settings, prefix, target, thoughts, warnings and config: as text, never evaluated
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "{{ 7*7 }}" in page.text and "49" not in page.text.split("Configuration")[0].split("Thoughts")[1]


def test_a_run_that_was_just_started(run_dir):
    for name in ("metrics.jsonl", "eval.jsonl", "thoughts.jsonl", "summary.json"):
        (run_dir / name).unlink()
    page = read(write_report(run_dir))
    assert "No held-out evaluation yet." in page.text and "No training step logged yet." in page.text
    assert "compose-0.6m" in page.text
    assert not (run_dir / "figures").exists()
    assert not {"svg", "table"} & {tag for tag, _ in page.tags}


def test_a_run_under_way_shows_the_first_and_the_latest_evaluation(run_dir):
    (run_dir / "summary.json").unlink()
    write_rows(run_dir / "eval.jsonl", [{"step": step} | eval_row(step / 60) for step in (0, 10, 20)])
    page = read(write_report(run_dir))
    assert "So far" in page.text and "step 20" in page.text and "after training" not in page.text.lower()
    write_rows(run_dir / "eval.jsonl", [{"step": 0} | eval_row(0)])
    page = read(write_report(run_dir))
    assert "Before training, thinking does not pay: −0.550" in page.text
    assert sum(tag == "th" and attributes.get("scope") == "col" for tag, attributes in page.tags) == 2  # label, before


def test_missing_keys_leave_out_their_curves_only(run_dir):
    keep = {"step", "reward_mean", "finite"}
    edit_rows(run_dir / "metrics.jsonl", lambda row: {k: v for k, v in row.items() if k in keep})
    optional = {"ce_empty", "ce_shuffled", "gain_ci95", "gain_over_empty", "gain_over_shuffled"}
    edit_rows(run_dir / "eval.jsonl", lambda row: {k: v for k, v in row.items() if k not in optional})
    write_report(run_dir)
    drawn = sorted(p.stem for p in (run_dir / "figures").glob("*.png"))
    assert drawn == ["accuracy", "cross_entropy", "gain", "reward"]


def test_torn_lines_repeated_steps_and_null_values(run_dir):
    rng = np.random.default_rng(1)
    again = metrics_row(41, 60, rng) | {"reward_mean": 123.0, "grad_norm": None, "finite": 0.0}
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(again) + "\n" + '{"step": 61, "rew')
    run = read_run(run_dir)
    assert [row["step"] for row in run.metrics] == list(range(1, 61))
    assert run.metrics[40]["reward_mean"] == 123.0 and math.isnan(number(run.metrics[40], "grad_norm"))
    assert run.skipped == [41]
    page = read(write_report(run_dir))
    assert "metrics.jsonl: 1 unreadable line" in page.text
    assert "Step 41: rewards or gradients were not finite" in page.text
    assert "step skipped" in (run_dir / "report.html").read_text()  # marked in the curves


def test_warnings_are_gathered_by_kind(run_dir):
    def warn(row):
        if row["step"] > 50:
            row["warnings"] = [f"thoughts have shrunk to {70 - row['step']}.5 tokens"]
        if row["step"] == 55:
            row["warnings"].append("not finite: the step is skipped")
            row["finite"] = 0.0
        return row

    edit_rows(run_dir / "metrics.jsonl", warn)
    text = read(write_report(run_dir)).text
    assert "10 steps from 51 to 60: thoughts have shrunk to 10.5 tokens" in text
    assert text.count("thoughts have shrunk") == 1
    assert "Step 55: not finite: the step is skipped" in text and text.count("Step 55") == 1


def test_rerunning_replaces_the_report(run_dir):
    first = write_report(run_dir).read_bytes()
    pictures = {p.name: p.read_bytes() for p in (run_dir / "figures").iterdir()}
    assert write_report(run_dir).read_bytes() == first
    assert {p.name: p.read_bytes() for p in (run_dir / "figures").iterdir()} == pictures


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "is not a run directory: it has no config.json"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[1]", "config.json holds a list, not an object"),
        ("summary.json", '{"before": {', "summary.json is not JSON"),
    ],
)
def test_a_directory_without_a_run_is_one_line_and_nothing_is_written(run_dir, name, content, message):
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_text(content)
    before = sorted(run_dir.iterdir())
    with pytest.raises(ReportError, match=re.escape(message)) as error:
        write_report(run_dir)
    assert str(run_dir) in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)
    assert sorted(run_dir.iterdir()) == before


def test_a_directory_that_does_not_exist(tmp_path):
    with pytest.raises(ReportError, match="absent is not a run directory"):
        write_report(tmp_path / "absent")


# gain and its interval, control means, intervals of the differences -> kind of verdict
@pytest.mark.parametrize(
    ("after", "kind", "words"),
    [
        ({"gain": 1.0, "gain_ci95": [0.9, 1.1], "gain_empty": -0.2, "gain_shuffled": 0.1}, "good", "both controls"),
        ({"gain": 1.0, "gain_ci95": [0.9, 1.1]}, "good", "clearly above zero."),
        ({"gain": 0.1, "gain_ci95": [-0.1, 0.3], "gain_empty": 0.2, "gain_shuffled": 0.0}, "bad", "does not pay"),
        ({"gain": 0.5, "gain_ci95": [0.4, 0.6], "gain_empty": 0.5, "gain_shuffled": 0.0}, "mixed", "format"),
        ({"gain": -0.3, "gain_ci95": [-0.4, -0.2], "gain_empty": -0.9, "gain_shuffled": -1}, "mixed", "they say helps"),
        # above the control's mean, but paired by document the difference may be nothing
        (
            {"gain": 0.5, "gain_ci95": [0.4, 0.6], "gain_empty": 0.3, "gain_over_empty": 0.2,
             "gain_over_empty_ci95": [-0.1, 0.5]},
            "mixed",
            "not clearly above",
        ),
        # and the reverse: wide intervals of their own, a clear difference
        (
            {"gain": 0.5, "gain_ci95": [0.1, 0.9], "gain_empty": 0.3, "gain_over_empty": 0.2,
             "gain_over_empty_ci95": [0.15, 0.25]},
            "good",
            "above its control",
        ),
    ],
)  # fmt: skip
def test_verdict(run_dir, after, kind, words):
    before = {"gain": -1.0, "ce_think": 3.0}
    (run_dir / "summary.json").write_text(json.dumps({"before": before, "after": after | {"ce_think": 1.0}}))
    found, text = verdict(read_run(run_dir))
    assert (found, words in text) == (kind, True), text
    assert "Beware" not in text


def test_verdict_sees_a_gain_that_comes_from_a_worse_baseline(run_dir):
    after = {"gain": 1.0, "gain_ci95": [0.9, 1.1], "ce_think": 3.2}
    (run_dir / "summary.json").write_text(json.dumps({"before": {"gain": -1.0, "ce_think": 3.0}, "after": after}))
    kind, text = verdict(read_run(run_dir))
    assert kind == "mixed" and "did not fall (3.000 to 3.200)" in text


def test_verdict_sees_a_gain_that_comes_from_the_lag_of_the_moving_average(run_dir):
    after = {"gain": 0.5, "gain_ci95": [0.4, 0.6], "ce_think": 2.0, "ce_no_think": 2.5, "ce_no_think_policy": 1.9}
    (run_dir / "summary.json").write_text(json.dumps({"before": {"gain": 0.0, "ce_think": 2.5}, "after": after}))
    kind, text = verdict(read_run(run_dir))
    assert kind == "mixed" and "without a thought (cross-entropy 1.900, after one 2.000)" in text


def test_sampled_thoughts_are_of_the_same_documents_early_and_late(run_dir):
    early, late = sample_thoughts(read_run(run_dir).thoughts)
    assert [(row["step"], row["document"]) for row in early] == [(1, 7), (1, 8)]
    assert [(row["step"], row["document"]) for row in late] == [(60, 8), (60, 7), (60, 9)]


def test_curves_take_the_colours_of_the_page(run_dir):
    for curve in draw_figures(read_run(run_dir)):
        assert "currentColor" in curve.svg and not [color for color in PAGE_COLORS if color in curve.svg]
        assert "font-family" not in curve.svg and "#000000" not in curve.svg
        assert f'aria-label="{curve.title}"' in curve.svg


def test_the_drawn_gain_is_the_evaluated_one(run_dir):
    """The curve's path in the SVG, mapped back to data by its own tick labels."""
    (gain,) = [c.svg for c in draw_figures(read_run(run_dir)) if c.name == "gain"]
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none; stroke: var\(--blue\)', gain)
    curve = np.array([[float(x) for x in p.split()] for p in re.findall(r"[ML] ([\d.]+ [\d.]+)", paths[0])])
    assert len(curve) == 7
    expected = np.array([eval_row(step / 60)["gain"] for step in range(0, 61, 10)])
    # SVG's y runs downwards; both are straight lines in the step, so compare shape by normalising
    np.testing.assert_allclose(
        (curve[0, 1] - curve[:, 1]) / (curve[0, 1] - curve[-1, 1]),
        (expected - expected[0]) / (expected[-1] - expected[0]),
        atol=1e-3,
    )
