"""The documentation is run: its commands, its Python, its option names and its links.

A fenced block below `<!-- run: NAME -->` is executed in a folder that holds what it names: the hub
ids of the documents are folders with tiny models there, so the text needs no changes to be run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from conftest import built
from forked_program import forked_program
from make_caches import make_cache

from kdcache.cache import Cache, ShardEntry
from kdcache.cli.main import cli
from kdcache.commands.demo.teacher import make_tokenizer
from kdcache.stream.batch import collate
from kdcache.targets import AnchoredTargets, DenseTargets, with_logits
from kdcache.targets.label_logprob import decode_entropies, decode_logprobs
from kdcache.tasks import IGNORE, TASKS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = sorted(ROOT.glob("examples/*.sh"))
CONFIGS = sorted(ROOT.glob("examples/config/*.yaml"))
FENCE = re.compile(
    r"(?:<!-- run: (?P<run>[\w-]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S
)
# Options of other programs in our documents, and other programs.
FOREIGN = {"--head", "--dashboard-host", "--generate"}
OTHERS = (
    "pip ",
    "pipx ",
    "uv ",
    "ray ",
    "pytest ",
    "torchrun ",
    "srun ",
    "sbatch ",
    "hf ",
    "pretrain ",
    "torchtitan ",
)


def _blocks(path: Path) -> Iterator[tuple[str | None, str, str]]:
    for found in FENCE.finditer(path.read_text()):
        yield found["run"], found["language"], found["text"]


def _block(document: str, name: str) -> str:
    (text,) = (t for run, _, t in _blocks(ROOT / document) if run == name)
    return text


def _commands() -> dict[str, set[str]]:
    """Options of each command."""
    context = click.Context(cli)
    options = {}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        options[name] = {o for p in shown for o in p.opts if o.startswith("--")}
        options[name] |= {"--help"}
    return options


def _calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Command and options of every `kdcache ...` line, continuation lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.match(r"\s*(?:\S+/)?kdcache (?P<command>[a-z]+)\b(?P<rest>.*)", line)
        if found:
            yield found["command"], re.findall(r"(?<!\S)--[a-z][\w-]*", found["rest"])


# What documents may say


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=lambda p: p.name)
def test_commands_and_options_exist(path: Path) -> None:
    known = _commands()
    text = path.read_text()
    fenced = "\n".join(t for _, _, t in _blocks(path)) if path.suffix == ".md" else text
    for command, options in _calls(fenced):
        assert command in known
        assert [o for o in options if o not in known[command]] == [], f"kdcache {command}"
    # Options named in running text belong to some command.
    every = set().union(*known.values()) | FOREIGN
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) if path.suffix == ".md" else []
    for span in spans:
        if not span.startswith(OTHERS):
            named = re.findall(r"(?<!\S)--[a-z][\w-]*", span)
            assert [o for o in named if o not in every] == [], span


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_config_files_hold_options_of_their_command(path: Path) -> None:
    command = path.name.split("-")[0]
    keys = yaml.safe_load(path.read_text())
    if command == "sweep":  # a grid of options of the training command
        command, keys = "train", keys.pop("grid") | keys
    assert {f"--{key}" for key in keys} <= _commands()[command]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCE.sub("", path.read_text()))
    for target in targets:
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_marked_blocks_are_run_by_a_test(path: Path) -> None:
    here = (ROOT / "tests" / "test_docs.py").read_text()
    for run, _, _ in _blocks(path):
        assert run is None or f'"{run}"' in here


def test_messages_that_operations_explains_are_said() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "kdcache").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", sources).replace("{_TRIES}", "3")
    table = (ROOT / "docs" / "operations.md").read_text().split("| you see |")[1].split("\n\n")[0]
    # Those of other programs are marked as such.
    cells = [line.split(" | ")[0] for line in table.splitlines() if "from `ray`" not in line]
    messages = [found for cell in cells for found in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 20
    parts = [part.strip() for message in messages for part in message.split("…")]
    assert [part for part in parts if part not in said and not part.startswith("--")] == []


def test_layout_in_the_design_is_the_real_one() -> None:
    layout = (ROOT / "docs" / "design.md").read_text().split("## Layout")[1].split("## Build")[0]
    named = re.findall(r"^\| `(\w+)/` \|", layout, re.M)
    folders = {p.parent.name for p in (ROOT / "kdcache").glob("*/__init__.py")}
    assert sorted(named) == sorted(folders)


def test_picture_is_an_image() -> None:
    from xml.etree import ElementTree

    picture = ElementTree.parse(ROOT / "docs" / "data-flow.svg").getroot()
    assert picture.tag.endswith("svg")
    assert picture.get("viewBox")


# Documents that run


@pytest.fixture
def desk(
    tmp_path: Path,
    tiny_lm: Path,
    tiny_classifier: Path,
    text_corpus: Path,
    labelled_corpus: Path,
) -> Path:
    """A folder with everything the documents name, tiny."""
    for name, model in (
        ("google-bert/bert-base-uncased", tiny_classifier),
        ("HuggingFaceTB/SmolLM2-135M", tiny_lm),
    ):
        shutil.copytree(model, tmp_path / name)
    encoder = json.loads((ROOT / "examples" / "config" / "student-modernbert.json").read_text())
    encoder |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    encoder |= {"num_attention_heads": 4, "vocab_size": 259, "max_position_embeddings": 512}
    (tmp_path / "student-modernbert.json").write_text(json.dumps(encoder))
    _masked_model(encoder, tmp_path / "answerdotai/ModernBERT-base")
    _pairs(tmp_path)
    file = tmp_path / "HuggingFaceTB/SmolLM2-135M/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 8192}))
    header, *labelled = labelled_corpus.read_text().splitlines()
    pairs = (line.split("\t") for line in labelled)
    labelled = [f"{' '.join(text.split()[:12])}\t{label}" for text, label in pairs]
    for name, lines in (
        ("train", labelled[:20]),
        ("dev", labelled[20:30]),
        ("test", labelled[30:40]),
    ):
        (tmp_path / f"{name}.tsv").write_text("\n".join([header, *lines]) + "\n")
    texts = text_corpus.read_text().splitlines(keepends=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(texts[:20]))
    (tmp_path / "text" / "b.jsonl").write_text("".join(texts[20:40]))
    (tmp_path / "held-out.jsonl").write_text("".join(texts[40:60]))
    config = json.loads((ROOT / "examples" / "config" / "student-llama.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    (tmp_path / "student.json").write_text(json.dumps(config))
    return tmp_path


def _masked_model(config: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    given = {key: value for key, value in config.items() if key != "model_type"}
    special = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2}
    made = AutoConfig.for_model("modernbert", **given, **special, sep_token_id=3, eos_token_id=3)
    AutoModelForMaskedLM.from_config(made).save_pretrained(folder)
    pieces = Path(__file__).parent / "tiny_tokenizers" / "wordpiece"
    AutoTokenizer.from_pretrained(pieces).save_pretrained(folder)


def _pairs(desk: Path) -> None:
    """A tiny T5, a smaller one, and pairs of texts."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config

    config = json.loads((ROOT / "examples" / "config" / "student-t5.json").read_text())
    config |= {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    (desk / "student-t5.json").write_text(json.dumps(config))
    ids = {"vocab_size": 259, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    given = {key: value for key, value in config.items() if key != "model_type"}
    folder = desk / "google" / "flan-t5-small"
    AutoModelForSeq2SeqLM.from_config(T5Config(**given, **ids)).save_pretrained(folder)
    pieces = Path(__file__).parent / "tiny_tokenizers" / "wordpiece"
    AutoTokenizer.from_pretrained(pieces).save_pretrained(folder)
    for name, first in (("pairs", 0), ("held-out-pairs", 8), ("sources", 16)):
        records = [
            {"source": f"{'ab' * i} the", "target": f"the {'b' * i}"}
            for i in range(first + 1, first + 9)
        ]
        if name == "sources":
            records = [{"source": record["source"]} for record in records]
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (desk / f"{name}.jsonl").write_text(lines)


Run = Callable[..., str]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a `kdcache` that has loaded its libraries."""
    with forked_program(tmp_path_factory.mktemp("loaded")) as folder:
        yield folder


@pytest.fixture
def run(desk: Path, loaded: Path) -> Run:
    """Run a program at the desk, as a user would; returns what it printed."""
    places = (loaded, Path(sys.executable).parent, os.environ["PATH"])

    def call(*command: str, **variables: str) -> str:
        environment = {
            **os.environ,
            "PATH": os.pathsep.join(map(str, places)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        done = subprocess.run(
            command, cwd=desk, env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return call


def _predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.end_to_end
def test_readme_classifier(run: Run, desk: Path) -> None:
    printed = run("bash", "-euo", "pipefail", "-c", _block("README.md", "classifier"))
    assert "accuracy" in printed
    predictions = _predictions(desk / "predictions.jsonl")
    assert len(predictions) == 10
    assert {p["label"] for p in predictions} <= {"bad", "neutral", "good"}
    assert "tensor" in run("python", "-c", _block("docs/guide.md", "load"))


@pytest.mark.end_to_end
def test_howto_of_labels_and_scores(run: Run, desk: Path, tiny_classifier: Path) -> None:
    shutil.copytree(tiny_classifier, desk / "ENCODER")
    words = ("red", "green", "blue", "hill", "river", "bread")
    for name in ("labels", "scores"):
        lines = []
        for i in range(24):
            chosen = [words[(i + k) % 6] for k in range(1 + i % 3)]
            record = {"text": " ".join(chosen)}
            if name == "labels":
                record |= {"labels": [w for w in chosen if w in words[:3]] if i % 5 else None}
            else:
                record |= {"other": words[i % 4], "score": i / 10 if i % 5 else None}
            lines.append(json.dumps(record) + "\n")
        (desk / f"{name}.jsonl").write_text("".join(lines))
    printed = run("bash", "-euo", "pipefail", "-c", _block("docs/howto.md", "labels"))
    for figure in ("micro average precision", "Spearman correlation", '"probabilities"'):
        assert figure in printed


@pytest.mark.end_to_end
def test_readme_language_model(run: Run, desk: Path) -> None:
    printed = run("bash", "-euo", "pipefail", "-c", _block("README.md", "language-model"))
    assert "all good" in printed
    assert (desk / "runs" / "distilled" / "model.safetensors").is_file()


@pytest.mark.end_to_end
def test_fresh_text(run: Run, desk: Path) -> None:
    (desk / "text" / "b.jsonl").unlink()
    prompts = (desk / "text" / "a.jsonl").read_text().splitlines(keepends=True)
    (desk / "text" / "a.jsonl").write_text("".join(prompts[:5]))
    run("bash", "-euo", "pipefail", "-c", _block("docs/fresh.md", "fresh"))
    assert list(desk.glob("fresh/shards/*.parquet"))
    assert (desk / "caches" / "fresh" / "manifest.json").is_file()


@pytest.mark.end_to_end
def test_guide_tagger(run: Run, desk: Path, tiny_tagger: Path) -> None:
    shutil.rmtree(desk / "google-bert/bert-base-uncased")
    shutil.copytree(tiny_tagger, desk / "google-bert/bert-base-uncased")
    sentence = "John B-PER\nSmith I-PER\nsaw O\nParis B-LOC\n. O\n"
    for name in ("train", "dev"):
        (desk / f"{name}.conll").write_text("\n".join([sentence] * 20))
    (desk / "unlabelled.jsonl").write_text(json.dumps({"tokens": ["Paris", "saw"]}) + "\n")
    printed = run("bash", "-euo", "pipefail", "-c", _block("docs/guide.md", "tagger"))
    assert "entity F1" in printed
    (found,) = _predictions(desk / "tags.jsonl")
    assert found["tokens"] == ["Paris", "saw"]
    assert set(found["tags"]) <= {"B-LOC", "B-PER", "I-PER", "O"}


@pytest.mark.end_to_end
def test_howto_with_another_tokenizer(run: Run, desk: Path) -> None:
    texts = [json.loads(x)["text"] for x in (desk / "held-out.jsonl").read_text().splitlines()]
    make_tokenizer(texts, desk / "my-tokenizer", vocab_size=280)
    run("bash", "-euo", "pipefail", "-c", _block("docs/howto.md", "cross-tokenizer"))
    assert (desk / "runs" / "own-tokens" / "tokenizer.json").is_file()


@pytest.mark.end_to_end
def test_guide_masked_language_model(run: Run, desk: Path) -> None:
    printed = run("bash", "-euo", "pipefail", "-c", _block("docs/guide.md", "masked"))
    assert "pseudo-perplexity" in printed
    assert (desk / "runs" / "masked" / "model.safetensors").is_file()


@pytest.mark.end_to_end
def test_guide_sequence_to_sequence(run: Run, desk: Path) -> None:
    printed = run("bash", "-euo", "pipefail", "-c", _block("docs/guide.md", "pairs"))
    assert "perplexity" in printed
    assert (desk / "runs" / "pairs" / "model.safetensors").is_file()
    assert len((desk / "written.jsonl").read_text().splitlines()) == 8


@pytest.mark.end_to_end
def test_guide_python(run: Run) -> None:
    printed = run("python", "-c", _block("docs/guide.md", "python"))
    assert "SparseTargets" in printed


@pytest.fixture
def training_cache(run: Run) -> None:
    """That of the page on training."""
    blocks = _blocks(ROOT / "docs" / "training.md")
    command = next(text for _, language, text in blocks if language == "sh")
    run("bash", "-euo", "pipefail", "-c", command.rstrip() + " --workers 0 --limit 40\n")


@pytest.mark.end_to_end
@pytest.mark.usefixtures("training_cache")
def test_training_page(run: Run, desk: Path) -> None:
    names = ("loop", "trainer", "own-loss")
    # One process for all, each block with names of its own.
    blocks = [_block("docs/training.md", name) for name in names]
    printed = run("python", "-c", "import sys\nfor b in sys.argv[1:]: exec(b, {})", *blocks)
    said = [line.split(":")[0] for line in printed.splitlines() if not line.startswith("{")]
    assert said == ["loop", "trainer", "own loss"]
    for folder in ("loop", "trainer/student", "own-loss/student"):
        assert (desk / "runs" / folder / "model.safetensors").is_file()


@pytest.mark.end_to_end
def test_page_of_targets_by_content(run: Run, desk: Path) -> None:
    page = "docs/by-content.md"
    run("python", "-c", _block(page, "by-content-rows"))
    run("bash", "-euo", "pipefail", "-c", _block(page, "by-content-build"))
    assert "by content: 3 steps" in run("python", "-c", _block(page, "by-content"))
    assert len(list((desk / "caches" / "rows" / "lookup").glob("*.index"))) == 1


@pytest.mark.end_to_end
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_page_of_targets_by_content_with_trl(run: Run, desk: Path) -> None:
    page = "docs/by-content.md"
    (desk / "sft.py").write_text(_block(page, "trl-by-content"))
    commands = _block(page, "trl-by-content-commands")
    assert "trl by content: " in run("bash", "-euo", "pipefail", "-c", commands)


@pytest.mark.exhaustive  # the commands are the README's
@pytest.mark.end_to_end
def test_example_classifier(run: Run, desk: Path) -> None:
    script = str(ROOT / "examples" / "classifier.sh")
    run("bash", script, DATA=".", OUT="out", EPOCHS="1")
    assert len(_predictions(desk / "out" / "predictions.jsonl")) == 10


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_example_language_model(run: Run, desk: Path) -> None:
    script = str(ROOT / "examples" / "language_model.sh")
    sizes = {"CODEC": "topk:16", "MAX_LENGTH": "64", "WORKERS": "0"}
    run("bash", script, OUT="out", STUDENT="student.json", **sizes)
    assert Cache.open(str(desk / "out" / "cache-train")).spec.codec == "topk:16"


@pytest.mark.end_to_end
def test_examples_in_python(run: Run) -> None:
    common = ("--student", "student.json")
    api = str(ROOT / "examples" / "python_api.py")
    assert "cross-entropy" in run("python", api, *common, "--out", "a", "--max-length", "64")
    own = str(ROOT / "examples" / "own_trainer.py")
    printed = run("python", own, *common, "--cache", "a/cache", "--out", "b")
    assert [line.split(":")[0] for line in printed.splitlines()] == ["stream", "dataset", "loop"]


# The format's reader, which knows nothing of kdcache


@pytest.fixture(scope="module")
def plain_reader() -> dict[str, Any]:
    """The functions of the block in docs/format.md."""
    text = _block("docs/format.md", "decode")
    assert "kdcache" not in text
    names: dict[str, Any] = {}
    exec(compile(text, "docs/format.md", "exec"), names)
    return names


GOLDEN = ROOT / "tests" / "golden"


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_format_of_a_golden_cache(plain_reader: dict[str, Any], name: str) -> None:
    """One of each codec, task and form of rows."""
    out = str(GOLDEN / name)
    cache = Cache.open(out)
    _same_as_library(plain_reader, cache, out)
    for shard in cache.manifest.shards:
        data = cache.read(shard.span)
        if data.source is not None:
            for i, source in enumerate(plain_reader["sources"](out, shard.name)):
                np.testing.assert_array_equal(source, data.row(i).source)
        if data.words is not None:
            for i, (words, first) in enumerate(plain_reader["words"](out, shard.name)):
                row = data.row(i)
                assert tuple(words) == row.words
                np.testing.assert_array_equal(first, row.first)


@pytest.mark.parametrize(
    ("codec", "temperatures"),
    [
        ("dense:float16", (1.0,)),
        ("sample:6", (1.0, 2.0, 4.0)),
        ("sample:40", (1.0, 2.0, 4.0)),  # more units than a byte holds
        ("anchored:6", (1.0,)),
    ],
)
def test_format_of_other_codecs(
    plain_reader: dict[str, Any], codec: str, temperatures: tuple[float, ...], tmp_path: Path
) -> None:
    """Over more ids than a byte names."""
    out = str(tmp_path / "cache")
    cache = make_cache(
        tmp_path / "cache", [4, 3], task="causal-lm", codec=codec, temperatures=temperatures,
        vocab=400, label_logprob=True,
    )  # fmt: skip
    _same_as_library(plain_reader, cache, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "temperatures"), [("hidden:float16", (1.0,)), ("hidden:bfloat16", (1.0, 3.0))]
)
def test_format_of_what_a_build_makes(
    plain_reader: dict[str, Any], codec: str, temperatures: tuple[float, ...], tiny_lm: Path,
    text_corpus: Path, tmp_path: Path,
) -> None:  # fmt: skip
    given = {"codec": codec, "temperatures": temperatures, "max_length": 32, "limit": 12}
    out = built(tiny_lm, Path(f"web={text_corpus}"), tmp_path / "cache", **given)
    cache = Cache.open(out)
    data = cache.read(0)
    assert data.entropy is not None
    assert data.label_logprob is not None
    assert cache.spec.domain_names == ("web",)
    _same_as_library(plain_reader, cache, out)


def _same_as_library(reader: dict[str, Any], cache: Cache, out: str) -> None:
    for shard in cache.manifest.shards:
        assert reader["domain"](out, shard.span) == shard.domain
        _same_shard(reader, cache, out, shard)


def _same_shard(reader: dict[str, Any], cache: Cache, out: str, shard: ShardEntry) -> None:
    data, name, answers = cache.read(shard.span), shard.name, TASKS[cache.spec.task].answers
    rows = list(reader["rows"](out, name))
    assert len(rows) == len(data) > 0
    for i, (ids, labels) in enumerate(rows):
        np.testing.assert_array_equal(ids, data.row(i).input_ids)
        want = data.row(i).labels
        unknown = 255 if answers == "labels" else IGNORE
        np.testing.assert_array_equal(labels, np.where(want == IGNORE, unknown, want))
    if data.starts is not None:
        divided = collate(data, pad_id=0, temperature=None)["position_ids"]
        for i, at in enumerate(reader["position_ids"](out, name)):
            np.testing.assert_array_equal(at, divided[i, : len(at)])
    if data.label_logprob is not None:
        ours, theirs = decode_logprobs(data.label_logprob), reader["label_logprobs"](out, name)
        np.testing.assert_allclose(theirs, ours, rtol=1e-7)
    if data.entropy is not None:
        np.testing.assert_allclose(reader["entropies"](out, name), decode_entropies(data.entropy))
    for temperature in cache.spec.temperatures:
        ours = with_logits(data.targets.at(temperature))
        theirs = list(reader["targets"](out, name, temperature))
        assert len(theirs) == len(ours) == shard.positions
        for i, (ids, weights, rest, inverse) in enumerate(theirs):
            got = np.bincount(ids.astype(int), weights, minlength=cache.spec.vocab_size)
            if isinstance(ours, DenseTargets):
                z = ours.logits[i].double() / (1 if answers == "score" else temperature)
                expected = {"labels": z.sigmoid(), "score": z}.get(answers, z.softmax(-1)).numpy()
            else:
                expected = np.bincount(
                    ours.ids[i].numpy(), ours.weights[i].numpy(), minlength=cache.spec.vocab_size
                )
                assert rest == pytest.approx(float(ours.tail[i]), abs=1e-6)
            assert (inverse is not None) == isinstance(ours, AnchoredTargets)
            if isinstance(ours, AnchoredTargets):
                assert len(ids[inverse == 0]) == ours.heads[i]
                np.testing.assert_allclose(inverse, ours.inverse[i, : len(ids)], rtol=1e-6)
                np.testing.assert_array_equal(ids, ours.ids[i, : len(ids)])
            np.testing.assert_allclose(got, expected, atol=1e-6)
