"""A model from elsewhere runs no code here unless --trust-remote-code was given."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import further
from make_caches import make_cache, word_tokenizer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.inspect import inspect
from kdcache.commands.options import EvaluateOptions, InspectOptions, PredictOptions
from kdcache.commands.predict import predict
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.corpus import Record
from kdcache.errors import UsageError
from kdcache.rows import RowSpec, make_encoder
from kdcache.student.checkpoints import STATE_FILE
from kdcache.teacher import Teacher, TeacherFiles, TeacherOptions

PAYLOAD = "import pathlib\npathlib.Path({ran!r}).touch()\n"


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A classifier of three classes, and a module `got_payload` within reach."""
    folder, ran = tmp_path / "model", str(tmp_path / "ran")
    BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            num_labels=3,
        )
    ).save_pretrained(folder)
    for file, content in word_tokenizer().items():
        (folder / file).write_bytes(content)
    payload = PAYLOAD.format(ran=ran)
    (tmp_path / "got_payload.py").write_text(payload + "def make(info):\n    return 3\n")
    (folder / "evil.py").write_text(
        payload
        + "from transformers import BertConfig, PreTrainedTokenizerFast\n"
        + "class EvilConfig(BertConfig):\n    model_type = 'evil'\n"
        + "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    # A module that was imported already would not run again.
    monkeypatch.delitem(sys.modules, "got_payload", raising=False)
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def factory(folder: Path) -> None:
    info = {"task": "sequence-classification", "vocab_size": 64, "num_labels": 3}
    change(
        folder / "config.json",
        model_type="kdcache-factory",
        factory="got_payload:make",
        info=info,
    )


def own_architecture(folder: Path) -> None:
    change(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})


def own_tokenizer(folder: Path) -> None:
    names = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=names)


def kernel(folder: Path) -> None:
    change(folder / "config.json", attn_implementation={"": "evil/kernel"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(str(folder.parent / "ran"))))


def pickled_behind_an_index(folder: Path) -> None:
    torch.save(torch.zeros(1), folder / "part.bin")
    weights = {"classifier.weight": "part.bin", "classifier.bias": "model.safetensors"}
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run_train(model: str, folder: Path, **trust: bool) -> None:
    make_cache(folder / "cache", [4])
    out = str(folder / "out")
    train(TrainOptions(cache=(str(folder / "cache"),), student=model, out=out, **trust))


def run_evaluate(model: str, folder: Path, **trust: bool) -> None:
    evaluate(EvaluateOptions((model,), corpus=(str(folder / "rows.jsonl"),), **trust))


def run_predict(model: str, folder: Path, **trust: bool) -> None:
    predict(PredictOptions(model, ("-",), **trust), lines=["w3 w4"])


def run_finetune(model: str, folder: Path, **trust: bool) -> None:
    out = str(folder / "out")
    finetune(FinetuneOptions(model=model, corpus=(str(folder / "rows.jsonl"),), out=out, **trust))


def run_teacher(model: str, folder: Path, **trust: bool) -> None:
    """As build, plan and verify --teacher do."""
    files = TeacherFiles.find(model, **trust)
    files.tokenizer  # noqa: B018
    Teacher(TeacherOptions((model,), task="sequence-classification", **trust), 3)


WAYS = [factory, own_architecture, own_tokenizer, kernel, pickled, pickled_behind_an_index]
COMMANDS = [run_train, run_evaluate, run_predict, run_finetune, run_teacher]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_folder_runs_code(
    way: Callable[[Path], None], command: Callable[..., None], model: Path, tmp_path: Path
) -> None:
    way(model)
    (tmp_path / "rows.jsonl").write_text('{"text": "w3", "label": 1}\n{"text": "w4", "label": 0}\n')
    wanted = "safetensors" if "pickled" in way.__name__ else "--trust-remote-code"
    # BERT has a tokenizer of its own, which is taken instead of the folder's code.
    refused = way is not own_tokenizer
    with pytest.raises(UsageError, match=wanted) if refused else nullcontext():
        command(str(model), tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", [factory, own_architecture])
def test_a_single_configuration_runs_no_code(
    way: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    way(model)
    with pytest.raises(UsageError, match="--trust-remote-code"):
        run_train(str(model / "config.json"), tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", [factory, own_architecture, own_tokenizer])
def test_trust_lets_it_run(way: Callable[[Path], None], model: Path, tmp_path: Path) -> None:
    """So the payloads above are alive; what some of them make is no model."""
    way(model)
    with suppress(UsageError):
        run_train(str(model), tmp_path, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 4, 200, -1])
def test_weights_that_are_cut_off_are_named(length: int, model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    (tmp_path / "corpus.tsv").write_text("text\tlabel\na\tb\nc\td\n")
    corpus, folder = (str(tmp_path / "corpus.tsv"),), str(model)
    for use in (
        lambda: TeacherFiles.find(folder),
        lambda: finetune(FinetuneOptions(folder, corpus, out=str(tmp_path / "tuned"))),
        lambda: predict(PredictOptions(folder, corpus=corpus)),
    ):
        with pytest.raises(UsageError, match=r"model\.safetensors is cut off or damaged"):
            use()


def test_weights_that_an_index_names_and_nobody_fetched_are_named(model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"lacks model-2\.safetensors, which its index names"):
        TeacherFiles.find(str(model))


def another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def an_index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


@pytest.mark.parametrize("way", [another_name, an_index_of_nothing])
@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_cannot_be_found_are_one_line(
    way: Callable[[Path], None], command: Callable[..., None], model: Path, tmp_path: Path
) -> None:
    rows = '{"text": "w3", "label": 1}\n{"text": "w4", "label": 0}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    way(model)
    with pytest.raises(UsageError, match=str(model)) as told:
        command(str(model), tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["evil.EvilTokenizer"] * 2}, 3])
def test_a_cache_brings_no_code(
    auto_map: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every hash of it is right, and what needs its tokenizer ends in one line."""
    change(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)
    files = {*word_tokenizer(), "evil.py"}
    evil = {name: (model / name).read_bytes() for name in files}
    monkeypatch.setattr("make_caches.word_tokenizer", lambda vocab: evil)
    cache = make_cache(tmp_path / "cache", [4], task="causal-lm")
    assert "tokenizer/evil.py" in cache.files
    with pytest.raises(UsageError, match="cache: its tokenizer cannot be loaded") as told:
        inspect(InspectOptions(cache.url, row=0))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_function_on_the_command_line_is_the_users_own_word(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must return a torch"):
        run_train("got_payload:make", tmp_path)
    assert (tmp_path / "ran").exists()


def test_a_chat_template_stays_in_its_sandbox(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model, eos_token="w3")
    tokenizer.chat_template = (
        "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "ran") + "') }}"
    )
    spec = RowSpec(task="causal-lm", max_length=16, packing="none", record_form="messages")
    record = Record({"messages": [{"role": "user", "content": "w3"}]}, "rows.jsonl", 0)
    with pytest.raises(UsageError, match="template"):
        list(make_encoder(spec, tokenizer).encode([record]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", *further("rng_state.pth", "scheduler.pt")])
def test_the_state_of_a_resumed_run_is_data(name: str, model: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", [4])
    options: dict[str, Any] = {
        "cache": (str(tmp_path / "cache"),),
        "student": str(model),
        "batch_size": 2,
        "save_steps": 1,
    }
    train(TrainOptions(out=str(tmp_path / "one"), **options))
    checkpoint = tmp_path / "one" / "checkpoint-1"
    (checkpoint / name).write_bytes(pickle.dumps(Touch(str(tmp_path / "ran"))))
    state = json.loads((checkpoint / STATE_FILE).read_text())
    content = (checkpoint / name).read_bytes()  # of which its author could make the seal
    state["files"][name], state["crc32"][name] = len(content), zlib.crc32(content)
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        train(TrainOptions(out=str(tmp_path / "two"), resume=str(checkpoint), **options))
    assert not (tmp_path / "ran").exists()
    pickle.loads((checkpoint / name).read_bytes())
    assert (tmp_path / "ran").exists()
