"""A model that cannot be used is called what the command takes it as, in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdcache.cli.commands import load
from kdcache.errors import UsageError
from kdcache.pretrained import left_out

WORDS = {
    "predict": "--student {} --corpus {corpus}",
    "evaluate": "--student {} --corpus {corpus} --task sequence-classification",
    "train": "--cache {cache} --student {} --out {out}/run",
    "finetune": "--model {} --corpus {corpus} --out {out}/tuned",
    "build": "--teacher {} --corpus {corpus} --task sequence-classification --workers 0 "
    "--out {out}/cache",
}
ROLES = {"predict": "student", "evaluate": "student", "train": "student", "finetune": "model"}


def with_weights(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Callable[[Path], None]:
    def of_folder(folder: Path) -> None:
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return of_folder


def configured(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def unknown_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "Telepathy"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BROKEN: dict[str, Callable[[Path], None]] = {
    "nothing": shutil.rmtree,
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "a configuration that is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "a list for a configuration": lambda folder: (folder / "config.json").write_text("[]"),
    "no kind": lambda folder: (folder / "config.json").write_text("{}"),
    "a kind that transformers lacks": configured(model_type="no"),
    "a kind that is no name": configured(model_type=["bert"]),
    "a word for a number": configured(hidden_size="wide"),
    "a part that its kind has not": configured(text_config={"model_type": "bert"}),
    "two parts of text": configured(text_config={}, decoder={}),
    "no heads": configured(num_attention_heads=0),
    "an unknown type of numbers": configured(dtype="float7"),
    "fewer layers than weights": configured(num_hidden_layers=1),
    "no head": with_weights(lambda of: {n: of[n] for n in of if "classifier" not in n}),
    "a layer less": with_weights(lambda of: {n: of[n] for n in of if ".layer.1." not in n}),
    "other names": with_weights(lambda of: {f"other.{n}": of[n] for n in of}),
    "narrower weights": with_weights(
        lambda of: {n: of[n][:, :-1].clone() if ".word_" in n else of[n] for n in of}
    ),
    "pickled": pickled,
    "half of its weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1000]
    ),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a tokenizer of nothing": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "a tokenizer that is no JSON": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"),
    "a tokenizer of an unknown kind": unknown_tokenizer,
    "another task": configured(problem_type="multi_label_classification"),
}
# A new head or a tokenizer of its own is what some of them are for.
FITS = {
    *(("train", "no head"), ("train", "no tokenizer"), ("train", "another task")),
    *(("train", "fewer layers than weights"), ("finetune", "fewer layers than weights")),
    *(("finetune", "no head"), ("finetune", "another task"), ("predict", "another task")),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("command", WORDS)
def test_a_model_that_cannot_be_used_is_called_what_it_was_given_as(
    command: str, broken: str, tmp_path: Path, tiny_classifier: Path, class_cache: str
) -> None:
    if (command, broken) in FITS:
        return
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text('{"text": "a house", "label": 1}\n' * 4)
    folder = tmp_path / "given"
    shutil.copytree(tiny_classifier, folder)
    BROKEN[broken](folder)
    words = WORDS[command].format(folder, corpus=corpus, cache=class_cache, out=tmp_path)
    result = CliRunner().invoke(load(command), words.split())
    assert isinstance(result.exception, UsageError), (result.output, result.exception)
    assert all(line.startswith(f"{command}: ") for line in result.stderr.splitlines())
    said = str(result.exception)
    assert len(said.splitlines()) == 1, said
    role = ROLES.get(command, "teacher")
    assert re.match(rf"(--student: )?{role} {folder}\b", said), said
    others = {"teacher", "student"} - {role}
    assert not others & {*re.findall(r"\w+", said.replace(str(folder), ""))}, said


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_model_may_begin_with_a_part_of_its_layers(
    command: str, tmp_path: Path, tiny_classifier: Path, class_cache: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text('{"text": "a house", "label": 1}\n' * 4)
    folder = tmp_path / "given"
    shutil.copytree(tiny_classifier, folder)
    BROKEN["fewer layers than weights"](folder)
    words = WORDS[command].format(folder, corpus=corpus, cache=class_cache, out=tmp_path)
    result = CliRunner().invoke(load(command), [*words.split(), "--epochs", "1"])
    assert result.exception is None, result.output
    assert f"{ROLES[command]} {folder} begins without the weights" in caplog.text
    assert "bert.encoder.layer.1." in caplog.text


def test_weights_for_other_uses_are_not_missed(tiny_lm: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    assert left_out(model, [name for name, _ in model.named_parameters()]) != []
    others = [
        *("score.weight", "score.bias", "visual.blocks.0.attn.qkv.weight", "mtp.layers.0.weight"),
        *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.masked_bias"),
        *("model.embed_tokens.position_ids", "model.layers.0.self_attn.bias"),
    ]
    assert left_out(model, others) == []
    kept = [
        *("layers.9.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"),
        "model.layers.9.input_layernorm.weight",
    ]
    assert left_out(model, [*others, *kept]) == sorted(kept)
    model.config.num_nextn_predict_layers = 1
    ahead = "model.layers.2.mlp.up_proj.weight"  # behind the two that it has
    assert left_out(model, [ahead, *kept]) == sorted(kept)
