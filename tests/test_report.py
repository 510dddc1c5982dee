"""`kdcache report`: well-formed, escaped and bounded, whatever it is about; then a real browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from make_caches import CAUSAL, make_cache
from transformers import AutoTokenizer

from kdcache.cli.main import cli
from kdcache.commands.inspect import _read, inspect
from kdcache.commands.inspect_result import Guess, PositionView, RowView
from kdcache.commands.options import InspectOptions, ReportOptions
from kdcache.commands.report import sections as report_rows
from kdcache.commands.report.charts import Curve, Table, curves, histogram
from kdcache.commands.report.gather import CachePart, RunPart, SweepPart, gather
from kdcache.commands.report.report import MOST_BYTES, environment, markup, render_page, report
from kdcache.commands.report.sections import run_section, sweep_section
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import UnexpectedError, UsageError
from kdcache.humanize import printable
from kdcache.rows import Row
from kdcache.tasks import TASKS

TOKENIZERS = Path(__file__).parent / "tiny_tokenizers"

HOSTILE = "</style></td><script>alert(1)</script>&lt;\"'\x00\x1b[2J\u202e\ud800\uffff]]><!--"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("report")
    make_cache(folder / "classes", [12, 9])
    make_cache(folder / "held", [8], first=500)
    make_cache(folder / "lm", [8, 6], task=CAUSAL, codec="topk:4", label_logprob=True)
    make_cache(folder / "sampled", [8], task=CAUSAL, codec="sample:4")
    train(
        TrainOptions(
            (str(folder / "classes"),),
            "bilstm",
            str(folder / "run"),
            eval_cache=(str(folder / "held"),),
            max_steps=4,
            eval_steps=2,
            logging_steps=1,
            batch_size=4,
        )
    )
    (folder / "begun").mkdir()
    shutil.copy(folder / "run" / "metrics.jsonl", folder / "begun")
    setting = {"setting": {"alpha": "0.5"}, "runs": ["a", "b"], "mean": {"accuracy": 0.75}}
    setting |= {"deviation": {"accuracy": 0.01}, "parameters": 12345, "seconds": 3.0}
    table = {"settings": [setting], "runs": [{}, {}], "ranked_by": "accuracy", "evaluated": True}
    (folder / "sweep").mkdir()
    (folder / "sweep" / "results.json").write_text(json.dumps(table))
    return {path.name: str(path) for path in folder.iterdir()}


def tree_of(page: str) -> ElementTree.Element:
    """The page, which is well-formed XML too."""
    head, _, rest = page.partition("\n")
    assert head == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def tree_of_blocks(*blocks: Any) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{markup(blocks)}</div>")


def words_of(node: ElementTree.Element) -> str:
    return " ".join(" ".join(node.itertext()).split())


@given(st.text())
def test_a_text_stays_a_text(value: str) -> None:
    made = environment().from_string('<p title="{{ it }}">{{ it }}</p>').render(it=value)
    node = ElementTree.fromstring(made)
    assert not list(node)
    bad = re.compile(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
    )
    want = bad.sub(lambda found: f"\\u{ord(found.group()):04x}", value)
    assert (node.text or "") == want
    assert node.attrib["title"].split() == want.split()


@pytest.mark.parametrize("name", ["good\u202e", "\u2067good", "\u05d8\u05d5\u05d1"])
def test_a_name_turns_no_figure_behind_it(name: str) -> None:
    """A class that ends in an override of the direction made 0.467 read 764.0."""
    guess = Guess(0, name, 0.467)
    position = PositionView(0, None, 0, name, None, (guess,), 0.0)
    row = RowView(0, 0, 4, "", None, 1.0, True, (position,))
    cell = report_rows._cells(position, row, per_token=False)["guesses"]
    (item,) = tree_of_blocks(Table("answers", ("label", "guesses"), [["x", cell]])).iter("li")
    isolated, figure = item
    assert (isolated.tag, figure.tag, figure.text) == ("bdi", "b", "0.467")
    shown = "".join(item.itertext())
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", shown)
    assert printable(name) in shown


@pytest.mark.slow
def test_a_page_shows_caches_runs_and_sweeps(paths: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    names = ["lm", "sampled", "classes", "run", "begun", "sweep"]
    done = CliRunner().invoke(
        cli, ["report", *(paths[name] for name in names), "--out", str(out), "--rows", "2"]
    )
    assert done.exit_code == 0, done.output
    assert f"{out}: 3 caches, 2 runs, 1 sweep, " in done.output
    page = tree_of(out.read_text())
    titles = [words_of(node) for node in page.iter("h2")]
    assert titles[0] == "Students beside their teachers"
    assert [title.split()[0] for title in titles[1:]] == 3 * ["Cache"] + 2 * ["Run"] + ["Sweep"]
    shown = words_of(page)
    for expected in (
        "topk:4",
        "Row 0: ",
        "mass stored",
        "The teacher's surprise at the labels",
        "Not finished: the same command continues",
        "Finished after 4 steps",
        "2 runs of 1 setting, best first by accuracy",
        "0.7500 ± 0.0100",
        "digests of the caches",
        "fingerprint",
        "Entries are drawn",
    ):
        assert expected in shown
    result = json.loads(Path(paths["run"], "train.json").read_text())["result"]
    assert f"{result['eval']['accuracy']:.4f}" in shown
    assert f"{result['one_answer']['accuracy']:.4f}" in shown
    assert f"It is {result['warning']}" in shown
    assert len(list(page.iter("polyline"))) >= 4
    assert {f"t s{i}" for i in range(6)} & {node.get("class") for node in page.iter("span")}


def rows_of(
    task: str, *positions: PositionView, read: tuple[str, ...] = (), between: str = " "
) -> tuple[str, str]:
    """Text and tables of a row of a task, as a page has them."""
    whole = {"read": read, "between": between}
    row = RowView(0, 0, 4, "an old text", None, 1.0, True, positions, **whole)
    tree = tree_of_blocks(*report_rows.rows_as_text([row], TASKS[task]))
    text = next(node for node in tree.iter("p") if node.get("class") == "row")
    return words_of(tree), words_of(text)


def test_a_tagged_row_is_its_words_and_a_masked_one_what_was_masked() -> None:
    guesses = (Guess(1, "B-X", 0.5), Guess(0, "O", 0.5))
    word = PositionView(1, "otter", 1, "B-X", None, guesses, 0.0)
    all_of_it, text = rows_of("token-classification", word, read=("[CLS]", "otter"))
    assert text == "[CLS] otter"
    assert "how surprised the teacher was by a word's label" in all_of_it
    assert "\u2018B-X\u2019 0.69" in all_of_it  # label and -log 0.5
    masked = PositionView(1, "[MASK]", 7, "otter", -0.5, (), 0.5)
    assert rows_of("masked-lm", masked, read=("[CLS]", "[MASK]"))[1] == "[CLS] otter"


@pytest.mark.parametrize("name", ["bytes", "pieces", "wordpiece"])
def test_a_row_that_is_read_whole_reads_as_the_text(name: str) -> None:
    """Tokens with a space of their own get no second one, parts of a word get none."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    text = "the unhappy otters are swimming down the river"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 8
    whole = _read(Row(np.array(ids, np.int32), np.array(ids, np.int32)), tokenizer)
    row = RowView(0, 0, len(ids), "", None, 1.0, True, (), **whole)
    (tree,) = tree_of_blocks(report_rows._read_tokens(row, TASKS["masked-lm"])).iter("p")
    assert "".join(tree.itertext()).removeprefix(" ") == text


def test_rows_have_the_columns_and_colours_that_their_task_has() -> None:
    several = PositionView(0, None, None, "a, b", None, (Guess(0, "a", 0.9),), 0.0)
    shown, text = rows_of("multi-label-classification", several)
    assert text == "an old text"
    assert "labels teacher's probabilities a, b a 0.900" in shown
    score = PositionView(0, None, None, "4.5", None, (), 0.0, 4.25)
    shown_score, _ = rows_of("regression", score)
    assert "score teacher's 4.5 4.25" in shown_score
    for page in (shown, shown_score):
        assert "Colour" not in page
        assert "nats" not in page
        assert "rest" not in page
    large = PositionView(0, None, None, "4.5", None, (), 0.0, float(np.float32(1234567.3)))
    assert "4.5 1234567.2" in rows_of("regression", large)[0]  # the nearest that a float32 has
    one = PositionView(0, None, 1, "b", None, (Guess(1, "b", 1.0),), 0.0)
    shown, _ = rows_of("sequence-classification", one)
    assert "Colour: how surprised the teacher was by a label, in nats." in shown


def test_a_row_without_a_position_is_shown_as_its_text(tmp_path: Path) -> None:
    """Builds leave such rows out, the format does not."""
    cache = make_cache(tmp_path / "lm", [60], task=CAUSAL, codec="topk:4")
    data = cache.read(0)
    bare = int(np.flatnonzero(np.diff(data.position_offsets) == 0)[0])
    found = inspect(InspectOptions(str(tmp_path / "lm"), row=bare)).row
    assert found is not None
    assert not found.positions
    assert found.text in words_of(tree_of_blocks(report_rows._row(found, TASKS[CAUSAL])))


def test_a_run_shows_what_was_left_to_its_default() -> None:
    options = {"student": "bilstm", "temperature": 1.0, "learning_rate": None}
    part = RunPart("r", True, options, {}, {"hard_loss": 0.5}, ())
    shown = words_of(tree_of_blocks(*run_section(part)))
    assert "temperature 1 learning rate default hard loss, training 0.5000" in shown


def sweep_of(path: str, setting: dict[str, Any], **more: Any) -> SweepPart:
    filled = {"deviation": {}, "runs": ["a"], "parameters": 1, **setting}
    table = {"settings": [filled], "ranked_by": "hard_loss", "runs": [{}], "evaluated": True}
    return SweepPart(path, {**table, **more})


@pytest.mark.parametrize("task", [*TASKS, None])
def test_the_hard_loss_has_the_name_of_the_task_in_runs_and_sweeps(task: Any) -> None:
    """Scores have an error, and no cross-entropy."""
    log = ({"step": 1.0, "loss": 0.5, "hard_loss": 0.5},)
    run = words_of(tree_of_blocks(*run_section(RunPart("r", True, {}, {}, {"task": task}, log))))
    setting = {"setting": {"alpha": "1"}, "mean": {"micro_f1": 0.5, "hard_loss": 0.25}}
    shown = words_of(tree_of_blocks(*sweep_section(sweep_of("s", setting, task=task))))
    name = "cross-entropy" if task is None else TASKS[task].hard[0]
    assert f"best first by {name};" in shown
    assert f" micro F1 {name} " in shown
    for other in {"error", "cross-entropy"} - {name}:
        assert other not in run + shown


@pytest.fixture(scope="module")
def page(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> ElementTree.Element:
    out = tmp_path_factory.mktemp("page") / "page.html"
    report(ReportOptions((paths["lm"], paths["run"], paths["sweep"]), out=str(out)))
    return tree_of(out.read_text())


@pytest.mark.slow
def test_a_page_asks_for_nothing_and_runs_nothing(page: ElementTree.Element) -> None:
    kinds = {node.tag for node in page.iter()}
    assert not kinds & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for node in page.iter():
        assert not any(name.startswith("on") or name in ("src", "style") for name in node.attrib)
        assert node.get("href", "#").startswith("#")
    (style,) = page.iter("style")
    assert not re.search(r"url\(|@import|expression", style.text or "")
    (policy,) = (n for n in page.iter("meta") if n.get("http-equiv") == "Content-Security-Policy")
    assert policy.get("content") == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.slow
def test_a_page_can_be_read_without_eyes_or_mouse(page: ElementTree.Element) -> None:
    assert page.get("lang") == "en"
    assert {node.get("name") for node in page.iter("meta")} >= {"viewport", "color-scheme"}
    ids = [node.get("id") for node in page.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    assert {node.get("href") for node in page.iter("a")} == {f"#{name}" for name in ids}
    for section in page.iter("section"):
        assert section.get("aria-labelledby") in ids
    for chart in page.iter("svg"):
        assert chart.get("aria-hidden") == "true" or (
            chart.get("role") == "img" and len(chart.get("aria-label") or "") > 10
        )
    for table in page.iter("table"):
        assert words_of(next(table.iter("caption")))
        assert all(cell.get("scope") in ("col", "row") for cell in table.iter("th"))
        widths = {len(list(row)) for row in table.iter("tr")}
        assert len(widths) == 1
    for box in page.iter("div"):
        if box.get("class") == "scroll":  # reached by keyboard, so that it can be scrolled
            assert (box.get("tabindex"), box.get("role")) == ("0", "region")
    levels = [int(n.tag[1]) for n in page.iter() if re.fullmatch("h[1-6]", n.tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def hostile_row() -> RowView:
    guesses = (Guess(1, HOSTILE, 0.5), Guess(2, "\n", 0.25))
    positions = tuple(
        PositionView(place, HOSTILE, 1, label, -float(place), guesses, 0.25)
        for place, label in enumerate((HOSTILE, "\n", "\n", "a"))
    )
    return RowView(0, 0, 5, HOSTILE, None, 1.0, True, positions, domain=HOSTILE)


def hostile_parts(paths: dict[str, str]) -> list[CachePart | RunPart | SweepPart]:
    part = gather(paths["lm"], ReportOptions((paths["lm"],)))
    assert isinstance(part, CachePart)
    spec = {**part.facts.spec, "corpus": [{"name": HOSTILE, "size": "x"}, {}], "seed": HOSTILE}
    facts = dataclasses.replace(part.facts, cache=HOSTILE, teachers=(HOSTILE,), spec=spec)
    deep: dict[str, Any] = {"accuracy": 0.5, "hard_loss": math.nan}
    return [
        dataclasses.replace(part, facts=facts, rows=(hostile_row(),), notes={HOSTILE: HOSTILE}),
        RunPart(
            HOSTILE,
            True,
            {"student": HOSTILE, "alpha": [HOSTILE]},
            {},
            {"eval": deep, "warning": HOSTILE},
            (),
        ),
        sweep_of(HOSTILE, {"setting": {HOSTILE: HOSTILE}, "mean": deep}),
    ]


@pytest.mark.slow
def test_hostile_texts_become_no_markup(paths: dict[str, str]) -> None:
    page = tree_of(render_page(hostile_parts(paths)))
    assert not list(page.iter("script"))
    assert "alert(1)" in words_of(page)
    assert "\\u001b[2J" in words_of(page)
    clean = tree_of(render_page([]))
    kinds = {node.tag for node in page.iter()} - {node.tag for node in clean.iter()}
    known = "article b caption dd details div dl dt figcaption figure h3 h4 line rect section span"
    known += " bdi h2 li p summary svg table tbody td text th thead title tr ul a"
    assert kinds <= set(known.split())


def test_a_teacher_that_was_fine_tuned_is_a_run_too(tmp_path: Path) -> None:
    values = {"options": {"model": "bert"}, "result": {"accuracy": 0.875, "steps": 3, "seconds": 9}}
    (tmp_path / "finetune.json").write_text(json.dumps(values))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 3, "loss": 2}\n')
    part = gather(str(tmp_path), ReportOptions((str(tmp_path),)))
    shown = words_of(tree_of(render_page([part])))
    assert "Finished after 3 steps in 9.0 s" in shown
    assert "bert" in shown
    assert "0.8750" in shown


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", "{"),
        ("train.json", "[1]"),
        ("metrics.jsonl", "nonsense\n"),
        ("results.json", "{"),
    ],
)
def test_files_that_are_damaged_are_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, TypeError)) as caught:
        gather(str(tmp_path), ReportOptions((str(tmp_path),)))
    assert UnexpectedError.of(caught.value).line.endswith(f"while reading {tmp_path / name}")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is no cache .* no run .* no finished sweep"):
        gather(str(tmp_path), ReportOptions((str(tmp_path),)))


def test_a_log_is_read_as_far_as_it_is_numbers(tmp_path: Path) -> None:
    lines = '{"step": 1, "loss": NaN}\n{"step": 3, "loss": 2.5}\n{"step": 4, "los'
    (tmp_path / "metrics.jsonl").write_text(lines)
    part = gather(str(tmp_path), ReportOptions((str(tmp_path),)))
    assert isinstance(part, RunPart)
    assert part.log == ({"step": 1}, {"step": 3, "loss": 2.5})
    tree_of(render_page([part]))


@pytest.mark.slow
def test_a_page_is_bounded(paths: dict[str, str]) -> None:
    part = hostile_parts(paths)[0]
    assert isinstance(part, CachePart)
    many = dataclasses.replace(hostile_row(), positions=hostile_row().positions * 500)
    huge = dataclasses.replace(part, rows=(many,) * 3)
    log = tuple({"step": float(i), "loss": float(i % 7)} for i in range(20_000))
    run = RunPart("run", False, {}, {}, {}, log)
    page = render_page([huge, run, *[huge] * 8])
    assert len(page.encode()) <= MOST_BYTES
    assert "Left out, to keep the page below 2.0 MB" in page
    tree_of(page)
    with pytest.raises(UsageError, match="201 paths, expected 1 to 200"):
        ReportOptions(("x",) * 201)


def test_steps_beyond_a_million_are_shown_to_the_last_digit() -> None:
    chart = curves("t", "step", "y", [Curve("a", ((0.0, 1.0), (1_234_567.0, 0.5)))])
    assert chart is not None
    shown = words_of(tree_of_blocks(chart))
    assert "a: 0.5 at 1,234,567" in shown
    assert " 1,250,000 " in shown
    assert "e+0" not in shown


def test_a_chart_draws_what_is_finite() -> None:
    nan = float("nan")
    assert curves("t", "x", "y", [Curve("a", ()), Curve("b", ((nan, 1.0), (1.0, nan)))]) is None
    assert histogram("t", "x", [nan, math.inf]) is None
    for points in (((1.0, 5.0),), ((0.0, 1e-9), (1.0, 1e-9)), ((0.0, -1e30), (1e6, 1e30))):
        chart = curves("t", "x", "y", [Curve("a", points)])
        assert chart is not None
        node = tree_of_blocks(chart)
        _, _, width, height = map(float, next(node.iter("svg")).get("viewBox", "").split())
        for circle in node.iter("circle"):
            assert 0 <= float(circle.get("cx", "nan")) <= width
            assert 0 <= float(circle.get("cy", "nan")) <= height
    bars = histogram("t", "x", [0.0] * 99 + [1000.0])
    assert bars is not None
    # Of an even number of values the median is between the two in the middle.
    for values, want in (([7.0], "1 position, median 7."), ([0.0, 5.0], "median 2.5.")):
        few = histogram("t", "x", values)
        assert few is not None
        assert want in few.about
    tall = [float(bar.get("height", "nan")) for bar in tree_of_blocks(bars).iter("rect")]
    assert max(tall) > 100


# A real browser


@pytest.fixture
def chromium(tmp_path: Path) -> list[str]:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("needs chromium")
    return [
        found,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
    ]


@pytest.mark.end_to_end
def test_a_browser_shows_the_page_without_sideways_scrolling(
    paths: dict[str, str], tmp_path: Path, chromium: list[str]
) -> None:
    """A phone and a desktop in frames of a page that measures them."""
    page = render_page(
        [*hostile_parts(paths), *(gather(paths[n], ReportOptions(("x",))) for n in ("lm", "run"))]
    )
    (tmp_path / "page.html").write_bytes(page.encode())
    frames = "".join(
        f'<iframe src="page.html" width="{w}" height="800"></iframe>' for w in (360, 1200)
    )
    measure = """<!DOCTYPE html><body>FRAMES<script>onload = () => {
      const found = [...document.querySelectorAll("iframe")].map(frame => {
        const page = frame.contentDocument;
        return [frame.clientWidth, page.documentElement.scrollWidth,
                page.querySelectorAll("section").length, page.querySelectorAll("script").length,
                getComputedStyle(page.querySelector(".s5")).backgroundColor];
      });
      document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
    }</script></body>"""
    (tmp_path / "measure.html").write_text(measure.replace("FRAMES", frames))
    done = subprocess.run(
        [*chromium, "--dump-dom", f"file://{tmp_path / 'measure.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(done.stdout.split("FOUND")[1].split("END")[0])
    assert [width for width, *_ in found] == [360, 1200]
    for width, needed, count, scripts, colour in found:
        assert needed <= width
        assert (count, scripts) == (6, 0)
        assert colour.startswith("rgb(")
