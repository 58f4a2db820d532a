import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from synthetic_run import FAMILIES, write_run

from rome.models import TokenizerError, train_tokenizer
from rome.rollout import Trace
from rome.training.report import write_report
from rome.training.report.charts import build_charts, smooth
from rome.training.report.data import before_and_after, stage_seconds, token_pieces

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "&lt;\u2028\x1b[2J\u202e"
)


def decode(ids) -> str:
    return bytes(int(i) % 256 for i in ids).decode("utf-8", "replace")


def page_data(path: Path) -> dict:
    """The JSON that the page's script reads."""
    return json.loads(re.search(r'id="run-data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


class Tags(html.parser.HTMLParser):
    """Start tags with their attributes, as a browser without a script would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "tiny"), decode)


def test_report_and_plots_are_written(report):
    assert report == report.parent / "report.html"
    plots = {path.name for path in (report.parent / "plots").iterdir()}
    assert plots == {"learning_curve.png", "ipa.png", "evaluation.png", "warm_start.png"}
    for name in plots:
        with Image.open(report.parent / "plots" / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(maxcolors=10**7)) > 5  # not blank


def test_page_loads_nothing_and_runs_only_its_own_script(report):
    text = report.read_text(encoding="utf-8")
    tags = Tags(text).found
    scripts = [attrs for tag, attrs in tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "run-data"}, {}]
    assert not [attrs for tag, attrs in tags if "src" in attrs or (tag == "link") or attrs.get("href", "#")[0] != "#"]
    assert "@import" not in text
    assert "url(" not in text
    policy = next(attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    script = text.rsplit("<script>", 1)[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_results_show_interval_families_and_horizons(report):
    text = report.read_text(encoding="utf-8")
    final = json.loads((report.parent / "result.json").read_text())["final"]
    assert f"{100 * final['success']:.1f}%" in text
    assert f"{100 * final['low']:.1f}% – {100 * final['high']:.1f}%" in text
    assert "24.0%" in text  # where IPA started
    for name in (*FAMILIES, "h 2", "h 6"):
        assert f"<span>{name}</span>" in text


def test_viewer_gets_chunks_with_what_the_step_said_of_them(report):
    steps = page_data(report)["steps"]
    assert [step["step"] for step in steps] == [1, 60, 120]
    notes = json.loads((report.parent / "trajectories" / "step_000120.json").read_text())
    shown = {item["id"]: item for item in steps[-1]["trajectories"]}
    item = shown["t120-3"]
    assert (steps[-1]["total"], len(shown)) == (24, 16)
    assert {t["success"] for t in shown.values()} == {True, False}
    assert [chunk["return"] for chunk in item["chunks"]] == pytest.approx(notes["t120-3"]["returns"], rel=1e-4)
    assert [chunk["kept"] for chunk in item["chunks"]] == notes["t120-3"]["kept"]
    chunk = item["chunks"][0]
    assert "".join(chunk["pieces"]) == chunk["text"]
    assert len(chunk["pieces"]) == len(chunk["logp"]) == len(chunk["ids"])


def test_run_in_its_first_minutes_has_a_report(tmp_path):
    path = write_report(tmp_path)
    assert "the run has just begun" in path.read_text(encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "cpt", "time": 5, "train/loss": 2.0}\n{"step": 2,')
    charts = page_data(write_report(tmp_path))["charts"]
    assert [(chart["title"], chart["series"][0]["y"]) for chart in charts] == [("train/loss", [2.0])]


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    run = write_run(tmp_path / "run", ipa_steps=20)
    (run / "config.json").write_text("{")
    (run / "result.json").write_text('["not", "a", "table"]')
    with open(run / "metrics.jsonl", "a") as file:
        file.write("[]\n")
    broken, other, last = sorted((run / "trajectories").glob("*.msgpack"))
    broken.write_bytes(broken.read_bytes()[:100])
    other.with_suffix(".json").write_text('{"t10-0": {"returns": "many", "kept": [1], "ratio": [NaN]}}')
    last.with_suffix(".json").unlink()
    path = write_report(run)
    text, data = path.read_text(encoding="utf-8"), page_data(path)
    listed = re.search(r'class="problems".*?</details>', text, re.S)[0]
    for name in ("config.json", "metrics.jsonl, line", broken.name):
        assert name in listed
    assert [step["step"] for step in data["steps"]] == [10, 20]
    assert data["steps"][0]["trajectories"][0]["chunks"][0]["return"] is None
    assert any(chart["key"] == "success" for chart in data["charts"])


def test_the_newest_trace_is_drawn_to_scale_and_a_damaged_one_is_named(tmp_path):
    run = write_run(tmp_path / "run", ipa_steps=4)
    assert "No trace yet" in write_report(run).read_text(encoding="utf-8")
    (run / "traces").mkdir()
    for name, lane in (("step_000001", "slot 7"), ("step_000002", "slot 8")):
        trace = Trace()
        trace.add("train", "wait for groups", 100.0, 4.0, groups=2)
        trace.add("decode 0", "3 chunks", 100.0, 1.0, tokens=9)
        trace.add(lane, "step", 101.0, 2.0, trajectory=HOSTILE)
        trace.write(run / "traces" / f"{name}.json")
    tags = Tags(write_report(run).read_text(encoding="utf-8")).found
    found = {dict(attrs)["class"]: dict(attrs) for tag, attrs in tags if tag == "rect"}
    assert set(found) == {"wait", "decode", "step"}
    widths = {name: float(rect["width"]) for name, rect in found.items()}
    assert widths["wait"] == pytest.approx(2 * widths["step"], abs=0.2)
    assert widths["step"] == pytest.approx(2 * widths["decode"], abs=0.2)
    assert float(found["step"]["x"]) == pytest.approx(float(found["wait"]["x"]) + widths["decode"], abs=0.2)
    assert [tag for tag, _ in tags].count("script") == 2
    text = write_report(run).read_text(encoding="utf-8")
    assert "slot 8" in text
    assert "slot 7" not in text
    (run / "traces" / "step_000002.json").write_text('{"traceEvents": [{"ph": "X"}]}')
    assert "traces/step_000002.json: KeyError" in write_report(run).read_text(encoding="utf-8")


def test_saved_tokenizer_shows_the_tokens_and_a_wrong_one_is_named(tmp_path):
    run = write_run(tmp_path / "run", ipa_steps=4)
    tokenizer = train_tokenizer(["ls notes", "cat a.txt"], 300)
    tokenizer.save(run / "tokenizer")
    chunk = page_data(write_report(run))["steps"][0]["trajectories"][0]["chunks"][0]
    assert len(chunk["pieces"]) == len(chunk["ids"])
    assert "".join(chunk["pieces"]) == tokenizer.decode(chunk["ids"])

    def too_small(ids):
        raise TokenizerError("id: expected 0..3")

    path = write_report(run, too_small)
    assert "cannot decode its tokens: id: expected 0..3" in path.read_text(encoding="utf-8")
    assert page_data(path)["steps"][0]["trajectories"][0]["chunks"][0]["pieces"] is None


def test_missing_run_directory_is_an_error(tmp_path):
    with pytest.raises(NotADirectoryError, match="none"):
        write_report(tmp_path / "none")


def test_hostile_text_stays_text(tmp_path):
    run = write_run(tmp_path / "run", ipa_steps=4, text=HOSTILE)
    hostile_metric = {
        "step": 5,
        "stage": "ipa",
        "time": 1.75e9,
        "<img src=x>": 1.0,
        "eval/success/<b>x": 0.5,
        "eval/success": 0.5,
    }
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(hostile_metric) + "\n")
    path = write_report(run, decode)
    tags = [tag for tag, _ in Tags(path.read_text(encoding="utf-8")).found]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert HOSTILE in page_data(path)["steps"][0]["trajectories"][0]["chunks"][0]["text"]


def test_every_metric_is_drawn_somewhere():
    records = [
        {"step": 1, "stage": "sft", "time": 1.0, "train/loss": 1.0},
        {
            "step": 1,
            "stage": "ipa",
            "time": 2.0,
            "train/success": 0.5,
            "new/metric": 1.0,
            "time/rollout": 2.0,
            "time/step": 3.0,
        },
        {"step": 1, "stage": "teacher", "time": 3.0, "train/loss": 1.0},
        {"step": 1, "stage": "eval", "time": 4.0, "eval/success": 0.5, "eval/episodes": 8.0},
    ]
    drawn = {(chart.section, chart.key) for chart in build_charts(records)}
    assert drawn == {
        ("warm", "warm train/loss"), ("ipa", "success"), ("ipa", "time"), ("more", "ipa new/metric"),
        ("more", "teacher train/loss"), ("more", "eval eval/episodes"),
    }  # fmt: skip


def test_long_runs_are_thinned_and_keep_their_last_point():
    records = [{"step": i, "stage": "ipa", "time": 0.0, "train/loss": float(i)} for i in range(5000)]
    series = next(chart for chart in build_charts(records) if chart.key == "loss").series[0]
    assert len(series.x) == 800
    assert (series.x[0], series.x[-1], series.y[-1]) == (0, 4999, 4999.0)


def test_smoothing_starts_at_the_first_value_and_passes_over_gaps():
    assert smooth([1.0, None, 1.0]) == [1.0, None, 1.0]
    assert smooth([0.0, 1.0], 0.5) == [0.0, pytest.approx(2 / 3, rel=1e-4)]


def test_before_is_the_evaluation_that_ipa_started_from():
    def record(stage, success=None):
        return {"step": 0, "stage": stage} | ({} if success is None else {"eval/success": success})

    assert before_and_after([record("sft")]) == (None, None)
    warm, end = record("eval", 0.2), record("eval", 0.8)
    assert before_and_after([record("eval", 0.0), warm, record("ipa"), record("eval", 0.5), end]) == (warm, end)
    assert before_and_after([warm]) == (warm, warm)


def test_stage_seconds_belong_to_the_stage_that_spent_them():
    times = [("cpt", 100.0), ("cpt", 101.0), ("sft", 105.0), ("ipa", 106.5)]
    records = [{"step": 1, "stage": stage, "time": time, "time/step": 2.0} for stage, time in times]
    assert stage_seconds(records) == {"cpt": 3.0, "sft": 4.0, "ipa": 1.5}


def test_character_of_several_tokens_appears_once():
    text = "aé→b"
    assert token_pieces(list(text.encode()), decode) == ["a", "", "é", "", "", "→", "b"]


# ---------------------------------------------------------------- in a real browser


def browse(path: Path, fragment: str, profile: Path) -> str:
    """The page's DOM after its script has run."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=2000 --window-size=1300,900"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--dump-dom", f"{path.as_uri()}#{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout


browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@browser
def test_browser_draws_curves_and_cards(report, tmp_path):
    dom = browse(report, "trajectory=t120-3&shading=1", tmp_path / "profile")
    tags = Tags(dom).found
    charts = {attrs["data-chart"] for tag, attrs in tags if "data-chart" in attrs}
    assert {
        "success",
        "ratio",
        "masks",
        "staleness",
        "grad",
        "time",
        "families",
        "horizons",
        "warm train/loss",
    } <= charts
    paths = [attrs["d"] for tag, attrs in tags if tag == "path"]
    assert len(paths) > 20
    assert not [d for d in paths if "NaN" in d or "Infinity" in d]
    shown = next(t for t in page_data(report)["steps"][-1]["trajectories"] if t["id"] == "t120-3")
    cards = [attrs["data-chunk"] for _, attrs in tags if "data-chunk" in attrs]
    assert cards == [chunk["id"] for chunk in shown["chunks"]]
    tokens = [attrs for tag, attrs in tags if attrs.get("class") == "token"]
    assert len(tokens) == sum(len(chunk["ids"]) for chunk in shown["chunks"])
    assert "log-prob" in tokens[0]["title"]
    assert "masked</span>" in dom
    assert ("aria-current", "true") in [
        ("aria-current", a.get("aria-current")) for _, a in tags if a.get("data-trajectory") == "t120-3"
    ]


@browser
def test_browser_runs_no_script_of_an_agent(tmp_path):
    path = write_report(write_run(tmp_path / "run", ipa_steps=4, text=HOSTILE), decode)
    dom = browse(path, "", tmp_path / "profile")
    assert "<title>run · ROME run</title>" in dom
    tags = [tag for tag, _ in Tags(dom).found]
    assert tags.count("script") == 2
    assert "img" not in tags
    body = dom.split('id="viewer"', 1)[1].split('id="config"')[0]
    assert "\u202e" not in body
    assert "⟨U+202E⟩" in body
    assert "␛[2J" in body


@browser
def test_browser_shows_an_empty_run(tmp_path):
    dom = browse(write_report(tmp_path), "", tmp_path / "profile")
    assert "No metrics yet." in dom
    assert "No trajectories saved yet." in dom
