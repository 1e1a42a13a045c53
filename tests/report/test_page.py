# SPDX-License-Identifier: Apache-2.0
"""The report of a synthetic run directory: what is there is shown, what is missing is not, nothing in it is trusted."""

import base64
import hashlib
import html.parser
import json
import math
import re

import numpy as np
import pytest
from synthetic import HOSTILE, documents_row, eval_row, metrics_row, thought, write_rows, write_run

from rlp_jax.config import ConfigError
from rlp_jax.report.curves import figures_of, on_page
from rlp_jax.report.figures import draw
from rlp_jax.report.page import render, write_comparison, write_report
from rlp_jax.report.run import ReportError, number, read_run
from rlp_jax.report.thoughts import sample_thoughts
from rlp_jax.report.verdict import verdict

FIGURES = ["accuracy", "cross_entropy", "entropy", "gain", "grad_norm", "ratio", "reward", "speed", "thoughts"]


@pytest.fixture
def run_dir(tmp_path):
    """A finished run of 60 steps, without recorded documents."""
    return write_run(tmp_path / "quickstart")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", {}
        self._in = None
        self.feed(text)

    def data(self, name):
        """What a script element of this id holds."""
        return json.loads(self.scripts[name])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = dict(attrs).get("id", "") if tag == "script" else None

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in is None:
            self.text += data
        else:
            self.scripts[self._in] = self.scripts.get(self._in, "") + data


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def page_of(run_dir):
    """The page without its pictures, which take most of the time."""
    return Page(render([read_run(run_dir)]))


def edit_rows(path, change):
    write_rows(path, [change(json.loads(line)) or json.loads(line) for line in path.read_text().splitlines()])


def test_a_finished_run(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert sorted(p.stem for p in (run_dir / "figures").glob("*")) == sorted(FIGURES)
    for png in (run_dir / "figures").glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and png.stat().st_size > 5000
    page = read(path)
    assert sorted(figure["name"] for figure in page.data("data")["figures"]) == sorted(FIGURES)
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


def test_the_page_is_one_offline_file_that_allows_itself_nothing_else(run_dir):
    write_rows(run_dir / "documents.jsonl", [documents_row(0, 1, np.random.default_rng(0))])
    text = render([read_run(run_dir)])
    page = Page(text)
    assert not {"link", "iframe", "img", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "href", "style", "srcset", "action"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.keys() == {
        "default-src", "style-src", "script-src", "base-uri", "form-action", "require-trusted-types-for",
        "trusted-types",
    }  # fmt: skip
    assert rules["default-src"] == "'none'" and "unsafe" not in policy
    for element, rule in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    script = content
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|setTimeout", script)
    assert not re.search(r"fetch\(|XMLHttp|import\(|WebSocket|sendBeacon|localStorage|cookie", script)


def test_untrusted_text_stays_text(run_dir):
    def poison(row):
        row["prefix"] = row["target"] = row["document"] = HOSTILE
        for one in row["thoughts"]:
            one["text"] = HOSTILE
        return row

    rng = np.random.default_rng(0)
    edit_rows(run_dir / "thoughts.jsonl", poison)
    edit_rows(run_dir / "metrics.jsonl", lambda row: row | {"warnings": [HOSTILE]})
    recorded = documents_row(0, 1, rng, tokens=2)
    recorded |= {"tokens": [HOSTILE, HOSTILE], "thoughts": [[thought(rng, [HOSTILE], rest=HOSTILE)]]}
    write_rows(run_dir / "documents.jsonl", [recorded])
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"name": HOSTILE, "model": HOSTILE}))
    text = render([read_run(run_dir)])
    page = Page(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 3 and "img" not in {tag for tag, _ in page.tags}
    # in title, heading, settings, prefix, target, thoughts, warnings and config: as text, never evaluated
    assert page.text.count("<script>window.broken = 1</script>") >= 8
    assert "{{ 7*7 }}" in page.text and "⟨U+202E⟩abc⟨U+2066⟩⟨U+D800⟩⟨U+0000⟩" in page.text
    assert not set(text) & set("\x00\u2028\u2029\u202e\u2066")
    (line,) = page.scripts["documents"].split("\n")
    assert json.loads(line)["tokens"][0].startswith("</script><script>window.broken = 1</script><img src=x")


def test_a_run_that_was_just_started(run_dir):
    for name in ("metrics.jsonl", "eval.jsonl", "thoughts.jsonl", "summary.json"):
        (run_dir / name).unlink()
    page = read(write_report(run_dir))
    assert "No held-out evaluation yet." in page.text and "No training step logged yet." in page.text
    assert "compose-0.6m" in page.text
    assert not (run_dir / "figures").exists()
    assert "table" not in {tag for tag, _ in page.tags} and page.data("data")["figures"] == []


def test_a_run_under_way_shows_the_first_and_the_latest_evaluation(run_dir):
    (run_dir / "summary.json").unlink()
    write_rows(run_dir / "eval.jsonl", [{"step": step} | eval_row(step / 60) for step in (0, 10, 20)])
    page = page_of(run_dir)
    assert "So far" in page.text and "step 20" in page.text and "after training" not in page.text.lower()
    write_rows(run_dir / "eval.jsonl", [{"step": 0} | eval_row(0)])
    page = page_of(run_dir)
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
    page = page_of(run_dir)
    assert "metrics.jsonl: 1 unreadable line" in page.text
    assert "Step 41: rewards or gradients were not finite" in page.text
    panels = [panel for figure in page.data("data")["figures"] for panel in figure["panels"]]
    assert {41} == {step for panel in panels for step in panel["skipped"]}  # marked in the curves of training


def test_warnings_are_gathered_by_kind(run_dir):
    def warn(row):
        if row["step"] > 50:
            row["warnings"] = [f"thoughts have shrunk to {70 - row['step']}.5 tokens"]
        if row["step"] == 55:
            row["warnings"].append("not finite: the step is skipped")
            row["finite"] = 0.0
        return row

    edit_rows(run_dir / "metrics.jsonl", warn)
    text = page_of(run_dir).text
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


def test_the_curves_are_the_rows(run_dir):
    run = read_run(run_dir)
    figures = {figure["name"]: figure for figure in on_page([run], ["quickstart"])}
    thought, empty, shuffled = figures["gain"]["panels"][0]["curves"]
    assert (thought["label"], empty["label"], shuffled["label"]) == ("thought", "empty thought", "shuffled thought")
    assert thought["x"] == list(range(0, 61, 10))
    for curve, key in ((thought, "gain"), (empty, "gain_empty"), (shuffled, "gain_shuffled")):
        expected = [eval_row(step / 60)[key] for step in range(0, 61, 10)]
        np.testing.assert_allclose(curve["y"], expected, atol=1e-5)
        np.testing.assert_allclose(curve["low"], np.array(expected) - 0.12, atol=1e-5)
        np.testing.assert_allclose(curve["high"], np.array(expected) + 0.12, atol=1e-5)
    (reward,) = figures["reward"]["panels"][0]["curves"]
    half = np.array([row["reward_std"] for row in run.metrics])
    np.testing.assert_allclose((np.array(reward["high"]) - reward["low"]) / 2, half, rtol=1e-4)


def test_a_long_curve_is_drawn_by_means_of_neighbours(run_dir):
    rng = np.random.default_rng(0)
    write_rows(run_dir / "metrics.jsonl", [metrics_row(step, 2500, rng) for step in range(1, 2501)])
    run = read_run(run_dir)
    (curve,) = next(f for f in on_page([run], [""]) if f["name"] == "entropy")["panels"][0]["curves"]
    assert curve["mean_of"] == 5 and len(curve["x"]) == 500
    expected = [np.mean([run.metrics[i]["entropy"] for i in range(at, at + 5)]) for at in range(0, 2500, 5)]
    np.testing.assert_allclose(curve["y"], expected, rtol=1e-5)


def test_the_drawn_gain_is_the_evaluated_one(run_dir):
    gain = next(figure for figure in figures_of(read_run(run_dir)) if figure.name == "gain")
    lines = draw(gain).axes[0].get_lines()
    expected = [eval_row(step / 60)["gain"] for step in range(0, 61, 10)]
    np.testing.assert_allclose(lines[0].get_ydata(), expected)


def test_best_and_worst_thoughts(run_dir):
    rng = np.random.default_rng(0)
    row = documents_row(60, 3, rng, tokens=3)
    row["trained"] = [True, False]
    row["thoughts"][0] = [
        thought(rng, [" deep", "</think>"], reward=50.0),
        thought(rng, [" odd"], close=0, reward=-40.0),
    ]
    row["thoughts"][1] = [thought(rng, [" elsewhere"], close=0, reward=99.0)]  # where the run does not think
    write_rows(run_dir / "documents.jsonl", [row])
    text = page_of(run_dir).text
    best, worst = text.split("Best and worst thoughts")[1].split("Worst", 1)
    assert "held-out, step 60" in best and "+50.000" in best and " deep\n" in best and "</think>" not in best
    assert worst.index("−40.000") < worst.index(" odd") and "elsewhere" not in text
    rewards = [float(x.replace("−", "-")) for x in re.findall(r"gain ([+−][\d.]+)", best)]
    assert rewards == sorted(rewards, reverse=True) and len(rewards) > 1


def test_runs_side_by_side(run_dir, tmp_path):
    other = write_run(tmp_path / "other", seed=1)
    third = write_run(tmp_path / "third", name="third")
    (third / "summary.json").unlink()
    write_rows(third / "eval.jsonl", [{"step": 0} | eval_row(0)])
    out = tmp_path / "all.html"
    assert write_comparison([run_dir, other, third], out) == out
    page = read(out)
    heads = [a for tag, a in page.tags if tag == "th" and a.get("scope") == "col"]
    assert len(heads) == 2 * 4  # of the figures and of the settings that differ: a column a run, and one of names
    text = page.text
    assert "3 runs compared" in text and text.count("thinking pays: +1.850") == 2 and "Before training" in text
    table = text.split("Held-out text")[1].split("Cross-entropy")[0]
    assert table.count("+1.850") == 2 and table.count("before −0.550") == 2
    assert "seed" in text.split("Settings that differ")[1]
    (panel,) = next(f for f in page.data("data")["figures"] if f["name"] == "gain")["panels"]
    assert {curve["of"] for curve in panel["curves"]} == {"quickstart", "other", "third"}  # by directory: names repeat
    assert not (tmp_path / "figures").exists()
    with pytest.raises(ConfigError, match="is there twice"):
        write_comparison([run_dir, tmp_path / "other" / ".." / "quickstart"], out)
    with pytest.raises(ConfigError, match="a directory that does not exist"):
        write_comparison([run_dir, other], tmp_path / "no" / "all.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.html", "other", "quickstart", "third"]
