"""Rows as long as a teacher reads, and none longer: what is asked for is kept or refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    RobertaConfig,
    RobertaModel,
)
from zoo import make

from kdcache.cache import Cache
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import prepare
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.options import EvaluateOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher import TeacherFiles
from kdcache.teacher.quirks import reach as reach_of


def changed(model: Path, folder: Path, **values: Any) -> Path:
    """A copy of a model with another configuration."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def test_more_than_a_teacher_reads_is_refused_and_not_lowered(
    small_build: BuildOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    assert prepare(small_build).spec.max_length == 128, "by default it is what the teacher reads"
    assert prepare(dataclasses.replace(small_build, max_length=128)).spec.max_length == 128
    with pytest.raises(
        UsageError,
        match=r"--max-length is 129, but teacher .* reads at most 128 tokens. Set it to 128",
    ):
        prepare(dataclasses.replace(small_build, max_length=129))
    other = changed(tiny_lm, tmp_path / "short", max_position_embeddings=64)
    both = dataclasses.replace(small_build, teacher=(str(tiny_lm), str(other)))
    assert prepare(both).spec.max_length == 64
    with pytest.raises(UsageError, match="short reads at most 64 tokens"):
        prepare(dataclasses.replace(both, max_length=100))


@pytest.mark.slow
def test_a_classifier_and_its_tokenizer_bound_a_row(
    small_build: BuildOptions, tiny_classifier: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    options = dataclasses.replace(
        small_build, teacher=(str(tiny_classifier),), corpus=(str(labelled_corpus),),
        task="sequence-classification", max_length=200,
    )  # fmt: skip
    with pytest.raises(UsageError, match="reads at most 128 tokens"):
        build(options)
    with pytest.raises(UsageError, match="reads at most 128 tokens"):
        finetune(
            FinetuneOptions(
                model=str(tiny_classifier), corpus=(str(labelled_corpus),), max_length=200,
                out=str(tmp_path / "tuned"),
            )
        )  # fmt: skip
    with pytest.raises(UsageError, match="reads at most 128 tokens"):
        evaluate(
            EvaluateOptions(
                student=(str(tiny_classifier),), corpus=(str(labelled_corpus),), max_length=200
            )
        )
    found = evaluate(
        EvaluateOptions(
            student=(str(tiny_classifier),), corpus=(str(labelled_corpus),), max_length=16
        )
    )
    assert any(" cut at 16 tokens (--max-length)" in note for note in found.notes)


@pytest.mark.parametrize(
    ("rope", "length", "reach"),
    [
        ({"rope_type": "default"}, 4096, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
         32768, 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
         131072, 131072),
        ({"rope_type": "linear", "factor": 2.0}, 4096, 8192),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 131072, 131072),
    ],
)  # fmt: skip
def test_positions_that_are_scaled_reach_further(
    tiny_lm: Path, tmp_path: Path, rope: dict[str, Any], length: int, reach: int
) -> None:
    config = LlamaConfig(
        max_position_embeddings=length, rope_parameters={**rope, "rope_theta": 1e4}
    )
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm, folder)
    config.save_pretrained(folder)
    files = TeacherFiles.find(str(folder), trust_remote_code=False, weights=False)
    assert files.reach(CAUSAL_LM) == reach


@pytest.mark.parametrize(
    "species",
    ["bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "esm",
     "gpt2", "layoutlm", "llama", "modernbert", "mpnet", "openai-gpt", "opt", "roberta",
     "xlm", "xlm-roberta"],
)  # fmt: skip
def test_a_student_reads_as_far_as_its_table_of_positions(species: str) -> None:
    """Its own forward agrees: so many tokens, and not one more; or any number."""
    model = AutoModel.from_config(make(species).config()).eval()
    reach = reach_of(model)

    def read(length: int) -> Any:
        with torch.inference_mode():
            return model(input_ids=torch.full((1, length), 5))

    read(reach or 140)
    if reach is not None:
        assert reach in (128, 126)  # the latter where positions begin behind the padding's id
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            read(reach + 1)


@pytest.mark.slow
def test_students_that_read_less_than_a_row_are_refused_or_read_its_beginning(
    tag_caches: dict[str, str], class_cache: str, tmp_path: Path
) -> None:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent / "tiny_tokenizers" / "bytes")
    config = RobertaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=14, **shape
    )
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    bert = {"model_type": "bert", "num_hidden_layers": 1, "max_position_embeddings": 10, **shape}
    (tmp_path / "bert.json").write_text(json.dumps(bert))

    def run(cache: str, student: str, **more: Any) -> Any:
        given = {"max_steps": 2, "batch_size": 1, "report_to": "none", **more}
        out = str(tmp_path / "run")
        return train(TrainOptions((cache,), student=str(tmp_path / student), out=out, **given))

    for student, most in (("roberta", 12), ("bert.json", 10)):  # its words, the teacher's tokens
        with pytest.raises(UsageError, match=rf"reads at most {most} tokens, and a row has \d\d"):
            run(tag_caches["first"], student)
    with pytest.raises(UsageError, match=r"--max-length is 13, but student .* at most 12 tokens"):
        run(class_cache, "roberta", max_length=13)
    assert run(class_cache, "roberta").steps == 2


@pytest.mark.slow
def test_a_row_of_4096_tokens(
    small_build: BuildOptions, tiny_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    teacher = changed(tiny_lm, tmp_path / "long", max_position_embeddings=131_072)
    corpus = tmp_path / "long.txt"
    texts = [json.loads(line)["text"] for line in text_corpus.read_text().splitlines()]
    corpus.write_text("\n".join(texts))
    options = dataclasses.replace(
        small_build, teacher=(str(teacher),), corpus=(str(corpus),), max_length=4096,
        codec="topk:4",
    )  # fmt: skip
    build(options)
    cache = Cache.open(options.out)
    data = max(map(cache.read, range(cache.spec.spans)), key=lambda data: len(data.input_ids))
    row = data.row(0)
    assert len(row.input_ids) == 4096
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    with torch.inference_mode():
        last = model(torch.from_numpy(row.input_ids).long()[None], logits_to_keep=1).logits[0, -1]
    found = data.targets.take(np.array([data.position_offsets[1] - 1])).at(1.0)
    best = last.softmax(-1).topk(4)
    assert found.ids[0].tolist() == best.indices.tolist()
    torch.testing.assert_close(found.weights[0], best.values, rtol=2.5e-2, atol=2e-3)
