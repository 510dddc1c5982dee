"""The command line: help, config files, outcomes, one line an error, exit codes."""

from __future__ import annotations

import json
import logging
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import click
import h5py
import pytest
from click.testing import CliRunner, Result

import kdcache
from kdcache.cli import display, printers
from kdcache.cli.commands import COMMANDS, _find, load
from kdcache.cli.main import cli
from kdcache.errors import UsageError
from kdcache.files import parse_yaml
from kdcache.models import BiLstmConfig
from kdcache.options import Options, options_of


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words), catch_exceptions=False)


@pytest.fixture
def words(tiny_classifier: Path, labelled_corpus: Path, tmp_path: Path) -> list[str]:
    return [
        "build", "--teacher", str(tiny_classifier), "--task", "sequence-classification",
        "--corpus", str(labelled_corpus), "--max-length", "32", "--limit", "30", "--workers", "0",
        "--out", str(tmp_path / "cache"),
    ]  # fmt: skip


LIBRARIES = ("accelerate", "fsspec", "h5py", "matplotlib", "numpy", "pyarrow", "ray", "tokenizers")
LIBRARIES += ("torch", "transformers", "rich", "kdcache.storage.remote")


def test_help_lists_every_command_and_no_help_or_wrong_option_loads_a_library() -> None:
    code = f"""if True:
        import sys
        from click.testing import CliRunner
        from kdcache.cli.commands import COMMANDS
        from kdcache.cli.main import cli
        def ask(*words):
            result = CliRunner().invoke(cli, words)
            print(result.output)
            return result.exit_code, [name for name in {LIBRARIES!r} if name in sys.modules]
        assert ask("--help") == (0, [])
        for name in COMMANDS:
            assert ask(name, "--help") == (0, []), name
            assert ask(name, "--no-such-option") == (2, []), name
            assert ask(name, "--temperature", "hot") == (2, []), name
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_command_explains_each_of_its_options(name: str) -> None:
    command = load(name)
    context = click.Context(command, info_name=name)
    help_text = command.get_help(context)
    assert "Examples:" in help_text
    for param in command.params:
        if isinstance(param, click.Option):
            assert param.help, f"{name} {param.opts[0]} has no help"
            assert "`" not in param.help
            words = (param.metavar or "").split("|")
            assert not [word for word in words if f"--{word} " in param.help], "a word to choose"
            assert not re.search(rf"{param.opts[0]}\b", param.help), "an option explained by itself"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_what_a_row_of_the_table_names_is_there(name: str) -> None:
    for row in filter(None, (COMMANDS[name], COMMANDS[name].dry_run)):
        assert callable(getattr(printers, row.printer))
        assert not row.display or callable(getattr(display, row.display))
        fields = {one.name for one in options_of(_find(row.options))}
        named = {field for _, field, _, _ in string.Formatter().parse(row.next) if field}
        assert {field.partition("[")[0] for field in named} <= fields
        next_command, *_ = row.next.split() or [name]
        assert next_command in COMMANDS


def test_helps_say_what_is_required_and_name_columns_as_they_are() -> None:
    def shown(name: str) -> str:
        command = load(name)
        return " ".join(command.get_help(click.Context(command, info_name=name)).split())

    assert "Folder or URL of the cache. [required]" in shown("build")
    assert "Seed of the noise of sample and anchored. [default: 0]" in shown("build")
    assert "for words tags, ner_tags or labels, a list." in shown("build")
    for name in COMMANDS:
        assert "or --labels" not in shown(name), "a column, not an option"
    tasks = "sequence-classification|multi-label-classification|regression|"
    assert f"--task {tasks}token-classification|seq2seq-lm The task" in shown("finetune")
    assert "GRID.yaml YAML file: options of kdcache train, and under grid those" in shown("sweep")
    assert "Arguments: CACHE" in shown("inspect")
    for name in ("build", "sweep"):
        assert re.search(r"--workers auto\|N[^\[]*\[default: auto\]", shown(name))
    sizes, told = BiLstmConfig(), shown("train").replace("- ", "-")
    for option in ("hidden_size", "layers", "dense_size", "dropout", "pooling"):
        default = getattr(sizes, option)
        says = f"{default:g}" if isinstance(default, float) else f"{default}"
        assert re.search(rf"{option.replace('_', '-')}[^,(]*\({says}\)", told), option
    assert f"else {sizes.embedding_size})" in told


def test_build_says_what_it_made_and_then_that_nothing_is_left(words: list[str]) -> None:
    first = run(*words)
    assert first.exit_code == 0
    assert "30 rows, 30 positions" in first.stdout
    again = run(*words)
    assert again.exit_code == 0
    assert "Nothing to do" in again.stdout
    outcome = run(*words, "--json")
    assert json.loads(outcome.stdout)["rows"] == 30, "one object"
    assert outcome.stderr == ""


def test_a_config_file_gives_options_and_flags_win(words: list[str], tmp_path: Path) -> None:
    config = tmp_path / "build.yaml"
    values = dict(zip(words[1::2], words[2::2], strict=True))
    lines = [f"{name.removeprefix('--')}: {value}" for name, value in values.items()]
    config.write_text("\n".join(lines) + "\ntemperatures: [1, 2]\n")
    result = run("build", "--config", str(config), "--limit", "12", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 12
    spec = json.loads((tmp_path / "cache" / "spec.json").read_text())["spec"]
    assert spec["temperatures"] == [1.0, 2.0]
    # YAML 1.1 reads the first two as 256 and 57.0.
    plain = {"a": "4:16", "b": "0:57.0", "c": 4.5}
    assert parse_yaml(b"a: 4:16\nb: 0:57.0\nc: 4.5") == plain
    config.write_text("limitt: 3\n")
    wrong = run("build", "--config", str(config))
    assert wrong.exit_code == 2
    assert "there is no option limitt. Did you mean limit?" in wrong.output
    for content, why in (
        (b"a: [1\nb: {", "expected ',' or ']', but got ':' in line 2, column 2."),
        (b"a: 1\n\tb: 2", "in line 2, column 1."),
        (b"a: \xff", "byte 3 is not UTF-8."),
        (b"a: 2020-99-99", "month must be in 1..12"),
        (b"a: \0", "special characters are not allowed"),
    ):
        config.write_bytes(content)
        wrong = run("build", "--config", str(config))
        assert wrong.exit_code == 2
        (line,) = [line for line in wrong.output.splitlines() if line.startswith("Error: ")]
        assert f"{config} is not valid YAML: " in line
        assert why in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--teacher", "/nowhere"), "neither a folder"),
        (("--corpus", "/nowhere.tsv"), "nowhere.tsv"),
        (("--columns", "text=body"), "no column 'text'"),
        (
            ("--temperatures", "warm"),
            "--temperatures is 'warm', expected a number, several with commas",
        ),
        (("--workers", "many"), "--workers is many, expected a number of at least 0"),
        (("--task", "causal-lm"), "Use --task sequence-classification"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(
    words: list[str], change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    name, value = change
    changed = [*words, name, value]
    if name in words:
        at = words.index(name)
        changed = [*words[: at + 1], value, *words[at + 2 :]]
    result = run(*changed)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_missing_options_are_named() -> None:
    result = run("build")
    assert result.exit_code == 2
    assert "missing --teacher, --corpus, --out" in result.stderr


def test_an_unfinished_cache_is_exit_code_3_and_a_broken_one_1(
    class_cache: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(class_cache, cache)
    assert run("verify", str(cache)).exit_code == 0
    shard = next((cache / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(bytes(content))
    broken = run("verify", str(cache))
    assert broken.exit_code == 1
    assert "shard 0" in broken.stderr
    (cache / "manifest.json").unlink()
    unfinished = run(
        "train", "--cache", str(cache), "--student", "bilstm", "--out", str(cache) + "r"
    )
    assert unfinished.exit_code == 3
    assert "kdcache build" in unfinished.stderr
    assert run("verify", str(tmp_path / "nothing")).exit_code == 2


def test_training_mistakes_are_told_at_once(
    lm_caches: dict[str, str], tiny_lm: Path, tmp_path: Path
) -> None:
    config = tmp_path / "student.json"
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 77, "hidden_size": 16,
                                  "num_attention_heads": 2, "num_hidden_layers": 1}))  # fmt: skip
    for change, message in (
        (("--student", str(config)), "77"),
        (("--student", "bilstm"), "bilstm"),
        (("--temperature", "3"), "1, 2"),
        (("--divergence", "mse"), "mse"),
        (("--alpha", "1.5"), "alpha"),
        (("--student", "/nowhere"), "nowhere"),
    ):
        base = {
            "--cache": lm_caches["topk:8"],
            "--student": str(tiny_lm),
            "--out": str(tmp_path / "run"),
        }
        base |= dict([change])
        result = run("train", *[word for pair in base.items() for word in pair])
        assert result.exit_code == 2, (change, result.output)
        assert message in result.stderr
        assert "Traceback" not in result.output


@pytest.mark.parametrize(("word", "hint"), [("biuld", "Did you mean build?"), ("x", "There are: ")])
def test_a_mistyped_command_is_answered_with_the_nearest(word: str, hint: str) -> None:
    result = run(word, "--out", "x")
    assert result.exit_code == 2
    assert f"there is no command {word}. {hint}" in result.stderr


def test_underscores_are_hyphens_and_the_environment_gives_options(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words[words.index("--max-length")] = "--max_length"
    at = words.index("--limit")
    monkeypatch.setenv("KDCACHE_BUILD_LIMIT", "12")
    monkeypatch.setenv("KDCACHE_BUILD_TEMPERATURES", "1,2")
    result = run(*words[:at], *words[at + 2 :], "--temperatures", "3", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 12
    spec = json.loads((Path(words[-1]) / "spec.json").read_text())["spec"]
    assert spec["temperatures"] == [3.0], "a flag takes precedence"
    monkeypatch.setenv("KDCACHE_BUILD_LIMIT", "few")
    assert "--limit is 'few'" in run("build").stderr


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    level = logger.level
    yield logger
    logger.setLevel(level)


def test_quiet_leaves_the_result_and_verbose_adds_messages(
    words: list[str], root: logging.Logger
) -> None:
    plain = run(*words)
    assert "build: " in plain.stderr
    assert f"Next: kdcache train --cache {words[-1]} --student bilstm --out RUN" in plain.stderr
    assert "build: " in run(*words).stderr, "also where nothing is left to do"
    for quiet in (run("-q", *words), run(*words, "-q")):
        assert (quiet.stderr, "is complete" in quiet.stdout) == ("", True)
    for verbose in (("-v", *words), (*words, "-v")):
        root.setLevel(logging.WARNING)
        run(*verbose)
        assert root.level == logging.INFO


def test_env_says_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_DISK", "s3://key:secret@host/disk")
    result = run("env")
    assert result.exit_code == 0
    installed = re.escape(version("torch"))
    assert re.search(rf"^torch +{installed}$", result.stdout, re.M)
    assert re.search(r"^KDCACHE_DISK +s3://host/disk$", result.stdout, re.M)
    report = json.loads(run("env", "--json").stdout)
    assert report["packages"]["h5py"] == h5py.__version__
    assert report["cores"] >= 1


@pytest.mark.parametrize(
    "words",
    [
        ("report", "x", "--out"),
        ("plan", "--teacher", "x", "--corpus", "x", "--plot"),
        ("evaluate", "--student", "x", "--cache", "x", "--plot"),
        ("train", "--student", "x", "--cache", "x", "--out", "y", "--plot"),
        ("predict", "--student", "x", "--corpus", "x", "--out"),
    ],
)
def test_a_file_to_write_that_is_a_folder_is_refused_before_the_work(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a folder").mkdir()
    for name in (f"{tmp_path}/a folder", "~/a folder"):
        result = run(*words, name)
        assert result.exit_code == 2
        assert f"{words[-1]} is {name}, a folder. Name a file." in result.output
    result = run(*words, "s3://bucket/x")
    assert result.exit_code == 2
    assert f"{words[-1]} is s3://bucket/x, expected a folder or file on this" in result.output
    if words[0] != "predict":  # which makes the folder
        result = run(*words, "~/none/x")
        assert f"{words[-1]}: there is no folder {tmp_path}/none." in result.output
        assert f"{words[-1]}: there is no folder" not in run(*words, "~/x").output
    assert "Traceback" not in run(*words, "~nobody-of-that-name/x").output


def test_what_newcomers_try_first_is_answered(
    tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with a header alone, a bare encoder, a codec of no kind, and a TSV with quotes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.tsv").write_text("text\tlabel\n")
    (tmp_path / "quoted.tsv").write_text('text\tlabel\n"a ""b"" c"\t1\n')
    shutil.copytree(tiny_classifier, "bare")
    raw = json.loads(Path("bare/config.json").read_text())
    Path("bare/config.json").write_text(json.dumps({**raw, "architectures": ["BertModel"]}))
    task = ("--task", "sequence-classification")

    def said(command: str, *words: str) -> str:
        result = CliRunner().invoke(cli, [command, *words])
        assert result.exit_code == 2, result.output
        return result.stderr

    build = ("--teacher", str(tiny_classifier), "--out", "cache", "--workers", "0")
    assert "the corpus has no rows" in said("build", *build, *task, "--corpus", "none.tsv")
    assert "has no usable row" in said(
        "build", *build, *task, "--corpus", "quoted.tsv", "--filter", "label=7"
    )
    tune = ("--model", str(tiny_classifier), "--out", "teacher", "--corpus", "none.tsv")
    assert "none.tsv has no rows" in said("finetune", *tune)
    bare = ("--teacher", "bare", "--out", "cache", "--corpus", "quoted.tsv")
    assert "bare is an encoder without a head: which --task?" in said("build", *bare)
    with mock.patch.dict("sys.modules", torch=None):  # it is not even looked for
        assert "--codec is 'topk', expected such as" in said("build", *bare, "--codec", "topk")
    words = ["--student", str(tiny_classifier), "--corpus", "quoted.tsv"]
    as_csv = ("--format", "csv", "--read", "delimiter=tab")
    for more, text in ((), '"a ""b"" c"'), (as_csv, 'a "b" c'):
        result = CliRunner().invoke(cli, ["predict", *words, *more])
        assert json.loads(result.stdout)["text"] == text


# Places where nothing can be written

# Words of each command with an output; those that look at their input first have a real one.
WORDS = {
    "build": "--teacher none --corpus none --out {}",
    "transcode": "none --codec topk:4 --out {}",
    "import": "--corpus none --tokenizer none --out {}",
    "export": "{cache} --out {}",
    "generate": "--model none --corpus none --out {}",
    "generate --cache": "--model none --corpus none --out {out} --cache {}",
    "pull CACHE": "{cache} {}",
    "train": "--cache {cache} --student bilstm --out {}",
    "sweep": "{grid} --out {} --workers 0",
    "finetune": "--model none --corpus none --out {}",
    "predict": "--student none --corpus none --out {}",
    "report": "none --out {}",
    "demo": "--out {}",
    "evaluate --plot": "--student none --cache none --plot {}",
    "train --plot": "--cache none --student bilstm --out {out} --plot {}",
    "plan --plot": "--teacher none --corpus none --plot {}",
}


@pytest.fixture(scope="module")
def known(class_cache: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("known")
    grid = folder / "grid.yaml"
    grid.write_text(f"cache: {class_cache}\nstudent: bilstm\ngrid:\n  seed: [0, 1]\n")
    return {"cache": class_cache, "grid": str(grid), "out": str(folder / "run")}


@pytest.mark.parametrize("place", ["/proc/x", "/sys/x", "/dev/null/x", "below a file"])
@pytest.mark.parametrize("named", WORDS)
def test_a_place_that_takes_nothing_is_refused_in_a_line(
    named: str, place: str, known: dict[str, str], tmp_path: Path
) -> None:
    if "--plot" in named:
        pytest.importorskip("matplotlib")
    file = tmp_path / "file"
    file.write_text("")
    path = str(file / "x") if place == "below a file" else place
    name, _, option = named.partition(" ")
    words = WORDS[named].format(path, **known).split()
    result = CliRunner().invoke(load(name), words)
    assert isinstance(result.exception, UsageError), (result.output, result.exception)
    message = str(result.exception)
    assert len(message.splitlines()) == 1, message
    assert (option or "--out") in message, message
    assert path[:30] in message, message
    assert list(tmp_path.iterdir()) == [file]


def test_every_option_of_an_output_is_tried() -> None:
    found = set()
    for name in dir(kdcache):
        kind = getattr(kdcache, name)
        if isinstance(kind, type) and issubclass(kind, Options):
            for one in options_of(kind):
                shown = one.metavar if one.positional else one.flag
                words = f"{name.removesuffix('Options').lower()} {shown}".removesuffix(" --out")
                assert one.output or one.name not in ("out", "plot"), words
                if one.output:
                    found.add(words)
    assert found == set(WORDS)
