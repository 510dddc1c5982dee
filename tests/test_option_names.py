"""Names of options: few, each in a document, and the former ones for one more version."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kdcache import (
    BuildOptions,
    EvaluateOptions,
    ImportOptions,
    PredictOptions,
    TrainOptions,
    VerifyOptions,
)
from kdcache.cli.commands import COMMANDS, _find
from kdcache.cli.main import cli
from kdcache.cli.printers import as_words
from kdcache.errors import UsageError
from kdcache.options import Option, Options, options_of, parse_values
from kdcache.tasks import Task

ROOT = Path(__file__).parent.parent
DOCUMENTS = [p for p in (ROOT / "docs").glob("*.md") if p.name != "log.md"] + [ROOT / "README.md"]
KINDS: dict[str, type[Options]] = {name: _find(row.options) for name, row in COMMANDS.items()}


@pytest.fixture(autouse=True)
def every_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras that are not installed here would be refused."""
    monkeypatch.setattr("kdcache.options.require", lambda extras: None)


def options(name: str) -> list[Option]:
    return [one for one in options_of(KINDS[name]) if not one.hidden]


def test_there_are_at_most_320_options() -> None:
    assert sum(len(options(name)) for name in KINDS) <= 320


def test_every_option_stands_in_a_document() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    flags = {one.flag for name in KINDS for one in options(name) if not one.positional}
    assert [f for f in sorted(flags) if not re.search(rf"{f}(?![\w-])", text)] == []


@pytest.mark.parametrize("name", list(KINDS))
def test_a_help_begins_with_ten_options_at_most_and_shows_no_former_one(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"], terminal_width=100)
    parts = dict(re.findall(r"^([A-Z][^\n]*):\n((?:  .*\n|\n)+)", result.output, re.MULTILINE))
    first = re.findall(r"^  --(\S+)", parts.get("Options", ""), re.MULTILINE)
    assert len(first) <= 10
    needed = {one.words for one in options(name) if one.required and not one.positional}
    assert needed <= set(first)
    assert "--config" in parts["Of every command"]
    shown = set(re.findall(r"^  (--[a-z0-9-]+)", result.output, re.MULTILINE))
    want = {one.flag for one in options(name) if not one.positional}
    assert shown == want | {"--config", "--json"}


BUILD = {"teacher": ("t",), "corpus": ("c",), "out": "o"}
TRAIN = {"cache": ("c",), "student": "bilstm", "out": "o"}
NAMES: list[tuple[type[Any], dict[str, Any], str, str, dict[str, Any]]] = [
    # kind, what else is needed, the former flag, the present one, fields that both set
    (BuildOptions, BUILD, "--engine vllm --tensor-parallel 2 --pipeline-parallel 3",
     "--engine vllm --engine-arg tensor_parallel_size=2 --engine-arg pipeline-parallel-size=3",
     {"tensor_parallel": 2, "pipeline_parallel": 3, "engine_args": {}}),
    (VerifyOptions, {"cache": "c"}, "--quantization fp8", "--engine-arg quantization=fp8",
     {"quantization": "fp8", "engine_args": {}}),
    (BuildOptions, BUILD, "--mask-share 0.3 --mask-unit word --mask-seed 4 --task masked-lm",
     "--mask share=0.3,unit=word,seed=4 --task masked-lm",
     {"mask_share": 0.3, "mask_unit": "word", "mask_seed": 4}),
    (TrainOptions, TRAIN, "--hidden-size 32 --layers 2 --dropout 0.5 --pooling max --max-words 9 "
     "--min-count 2 --dense-size 8 --embedding-size 4 --freeze-embeddings",
     "--bilstm hidden-size=32,layers=2,dropout=0.5,pooling=max,max-words=9,min_count=2,"
     "dense-size=8,embedding-size=4,freeze-embeddings=true",
     {"bilstm_settings": {
         "hidden_size": 32, "layers": 2, "dropout": 0.5, "pooling": "max", "max_words": 9,
         "min_count": 2, "dense_size": 8, "embedding_size": 4, "freeze_embeddings": True}}),
    (PredictOptions, {"student": "s", "corpus": ("c",)}, "--pair-column pair",
     "--columns pair=second", {"pair_column": "pair"}),
    (BuildOptions, BUILD, "--max-workers 4", "--workers 1:4", {"worker_range": (1, 4)}),
    (ImportOptions, {"corpus": ("c",), "tokenizer": "t", "out": "o"}, "--from jsonl",
     "--format jsonl", {"format": "jsonl", "from_": None}),
    (EvaluateOptions, {"student": ("s",), "corpus": ("c",)}, "--pair-column pair",
     "--columns text,pair,label", {"pair_column": "pair"}),
    (BuildOptions, BUILD, "--documents line --delimiter ; --max-record-bytes 99",
     "--read documents=line,delimiter=;,max-record-bytes=99",
     {"documents": "line", "delimiter": ";", "max_record_bytes": 99}),
    (ImportOptions, {"corpus": ("c",), "tokenizer": "t", "out": "o"}, "--max-record-bytes 99",
     "--read max-record-bytes=99", {"max_record_bytes": 99}),
    (BuildOptions, BUILD, "--chat-template f --chat-template-kwargs {} --learn a,b "
     "--reasoning read",
     "--chat template=f --chat template-kwargs={} --chat learn=a,b --chat reasoning=read",
     {"chat_template": "f", "chat_template_kwargs": "{}", "learn": ("a", "b"),
      "reasoning": "read"}),
    (PredictOptions, {"student": "s", "corpus": ("c",)},
     "--max-source-length 9 --source-lang x --target-lang y",
     "--seq2seq max-source-length=9,source-lang=x,target-lang=y",
     {"max_source_length": 9, "source_lang": "x", "target_lang": "y"}),
    (BuildOptions, BUILD,
     "--gpus-per-worker 0.5 --cpus-per-worker 2 --hang-seconds 9 --wait-minutes 3",
     "--worker gpus=0.5,cpus=2,hang-seconds=9,wait-minutes=3",
     {"gpus_per_worker": 0.5, "cpus_per_worker": 2, "hang_seconds": 9.0, "wait_minutes": 3.0}),
    (TrainOptions, TRAIN, "--gpus-per-worker 0 --max-failures 4 --wait-minutes 3 "
     "--shuffle-shards 5 --prefetch 6 --eval-steps 7",
     "--worker gpus=0,max-failures=4,wait-minutes=3 --read shuffle-shards=5,prefetch=6 "
     "--save-steps 7",
     {"gpus_per_worker": 0.0, "max_failures": 4, "wait_minutes": 3.0, "shuffle_shards": 5,
      "prefetch": 6, "save_steps": 7, "eval_steps": None}),
]  # fmt: skip


def made(kind: type[Any], words: list[str], **environment: str) -> Any:
    """The options that a command line gives."""
    name = next(name for name, one in KINDS.items() if one is kind)
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kdcache.cli.commands._run", lambda row, options, as_json: found.append(options)
        )
        result = CliRunner().invoke(cli, [name, *words], env={**os.environ, **environment})
    assert result.exit_code == 0, result.output
    return found[0]


@pytest.mark.parametrize(("kind", "needs", "former", "now", "fields"), NAMES)
def test_former_names_do_what_the_present_ones_do(
    kind: type[Any], needs: dict[str, Any], former: str, now: str, fields: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    first: list[str] = []
    for one in options_of(kind):
        if one.name in needs:
            value = needs[one.name][0] if one.several else needs[one.name]
            first += [value] if one.positional else [one.flag, value]
    for words in (former, now):
        options = made(kind, [*first, *words.split()])
        assert {name: getattr(options, name) for name in fields} == fields
        # The same from a file and from the environment.
        pairs = re.findall(r"--([a-z0-9-]+)(?: (?!--)(\S+))?", words)
        file = tmp_path / "options.yaml"
        lines: dict[str, list[str]] = {}
        for name, value in pairs:
            lines.setdefault(name, []).append(value or "true")
        values = {name: v if len(v) > 1 else v[0] for name, v in lines.items()}
        file.write_text(yaml.safe_dump(values))
        assert made(kind, [*first, "--config", str(file)]) == options
        command = next(name for name, one in KINDS.items() if one is kind).upper()
        names = {one.words: one.name.upper() for one in options_of(kind)}
        environment = {f"KDCACHE_{command}_{names[name]}": " ".join(v) for name, v in lines.items()}
        assert made(kind, first, **environment) == options
        again = kind(**{**needs, **parse_values(kind, dict(_words(as_words(options, kind))))[0]})
        assert again == options


def _words(words: list[str]) -> list[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) and words[i + 1][:2] != "--" else "true"
            old = found.get(word[2:])
            found[word[2:]] = (
                value if old is None else [*(old if isinstance(old, list) else [old]), value]
            )
    return list(found.items())


ROWS = {  # options, and the rows of their spec.json: fields of the first version, and later ones
    "token-classification": (
        {"words_column": "w", "label_column": "none"},
        """
        "text_column": "text", "pair_column": null, "label_column": null, "label_names":
        ["a", "b"], "max_length": 17, "packing": "none", "messages_column": "messages",
        "prompt_column": "prompt", "completion_column": "completion", "record_form":
        "auto", "on_error": "fail", "words_column": "w"
        """,
    ),
    "causal-lm": (
        {
            "attend": "document",
            "learn": ("a", "b"),
            "chat_template_kwargs": "{}",
            "reasoning": "read",
        },
        """
        "text_column": "text", "pair_column": null, "label_column": "label",
        "label_names": null, "max_length": 17, "packing": "concat", "attend":
        "document", "messages_column": "messages", "chat_template_kwargs": "{}",
        "learn": ["a", "b"], "reasoning": "read", "prompt_column": "prompt",
        "completion_column": "completion", "record_form": "auto", "on_error": "fail"
        """,
    ),
    "masked-lm": (
        {"mask": {"share": 0.3, "unit": "word"}, "text_column": "x", "on_error": "skip"},
        """
        "text_column": "x", "pair_column": null, "label_column": "label", "label_names":
        null, "max_length": 17, "packing": "concat", "messages_column": "messages",
        "prompt_column": "prompt", "completion_column": "completion", "record_form":
        "auto", "on_error": "skip", "mask_share": 0.3, "mask_unit": "word"
        """,
    ),
    "seq2seq-lm": (
        {"source_lang": "x", "columns": "target=theirs", "max_source_length": 7},
        """
        "text_column": "text", "pair_column": null, "label_column": "label",
        "label_names": null, "max_length": 17, "packing": "none", "messages_column":
        "messages", "prompt_column": "prompt", "completion_column": "completion",
        "record_form": "auto", "on_error": "fail", "max_source_length": 1024,
        "source_lang": "x"
        """,
    ),
}


@pytest.mark.parametrize("task", ROWS)
def test_a_row_spec_is_written_as_it_always_was(task: Task) -> None:
    given, text = ROWS[task]
    options = BuildOptions(**{**BUILD, **given, "task": task})
    spec = options.row_spec(task, ("a", "b"), max_length=17)
    assert json.dumps(spec.to_dict()) == f'{{"task": "{task}", {" ".join(text.split())}}}'


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainOptions, {**TRAIN, "bilstm": "layers=many"},
         "--bilstm layers is 'many', expected a whole number."),
        (TrainOptions, {**TRAIN, "bilstm": "depth=2"},
         "--bilstm is 'depth=2', expected KEY=VALUE of freeze-embeddings, embedding-size, "
         "hidden-size, layers, dense-size, dropout, pooling, min-count, max-words."),
        (TrainOptions, {**TRAIN, "bilstm": {"pooling": "mean"}},
         "--bilstm pooling is 'mean', expected one of last, max."),
        (TrainOptions, {**TRAIN, "bilstm": "layers=2", "layers": 3},
         "--layers and --bilstm layers=2 differ: give the latter alone."),
        (BuildOptions, {**BUILD, "engine": "vllm", "engine_arg": ("tensor_parallel_size=0",)},
         "--engine-arg tensor_parallel_size is 0, expected at least 1."),
        (TrainOptions, {**TRAIN, "save_steps": 2, "eval_steps": 3},
         "--eval-steps and --save-steps differ: give the latter alone."),
        (BuildOptions, {**BUILD, "worker": {"gpus": "many"}},
         "--worker gpus is 'many', expected a number."),
        (BuildOptions, {**BUILD, "mask": "share=2"},
         "--mask share is 2, expected more than 0 and less than 1."),
        (BuildOptions, {**BUILD, "pair_column": "a", "columns": "pair=b"},
         "--pair-column and --columns pair=b differ: give the latter alone."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_key_is_told(
    kind: type[Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as told:
        kind(**values)
    assert str(told.value) == message


def test_a_former_name_is_told_on_the_command_line() -> None:
    result = CliRunner().invoke(
        cli, ["predict", "--student", "none", "--corpus", "none", "--pair-column", "b"]
    )
    assert (
        "--pair-column goes with the next version. Say --columns pair=... instead." in result.stderr
    )
