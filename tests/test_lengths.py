"""Models that read a row otherwise beside a longer one, or after other batches: rotary positions,
BigBird, NLLB-MoE, RWKV.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from zoo import Species, make

from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.options import EvaluateOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.rows import Row
from kdcache.student import StudentInfo, load_student
from kdcache.teacher import Teacher, TeacherOptions
from kdcache.teacher.quirks import length_class

ORIGINAL = 32
SHORT, LONG = [20] * 4, 60


def rope(kind: str) -> dict[str, Any]:
    if kind == "llama":
        return {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    return {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": ORIGINAL,
    }


def saved(species: Species, folder: Path, auto: Any = AutoModelForCausalLM) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = species.config(vocab_size=64, pad_token_id=0)
        auto.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "phi3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model that was stretched from `ORIGINAL` tokens."""
    stretched = {"max_position_embeddings": ORIGINAL if request.param == "llama" else 4 * ORIGINAL}
    if request.param == "phi3":
        stretched["original_max_position_embeddings"] = ORIGINAL
    return saved(make(request.param, rope_parameters=rope(request.param), **stretched), tmp_path)


def rows_of(*lengths: int) -> list[Row]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 64, n).astype(np.int32) for n in lengths]
    return [Row(one, one) for one in ids]


def class_rows(*lengths: int) -> list[Row]:
    return [Row(row.input_ids, np.zeros(1, np.int32)) for row in rows_of(*lengths)]


def alone(folder: Path, row: Row) -> torch.Tensor:
    """The logits of a row by a model that has read nothing else."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]


def test_a_row_has_the_logits_that_it_has_alone(folder: Path) -> None:
    teacher = Teacher(TeacherOptions((str(folder),), "causal-lm", device="cpu"), 64)
    teacher.probe(rows_of(9, 7, 5))  # a real one's rows are shorter than what it was stretched from
    for lengths in ((LONG, 50, ORIGINAL, *SHORT), (50, 40, 40), SHORT):
        rows = rows_of(*lengths)
        want = torch.cat([alone(folder, row) for row in rows])
        got = torch.cat([z.clone() for z in teacher.logits(rows)])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_bigbird_attends_to_blocks_of_long_rows_alone(tmp_path: Path) -> None:
    sparse = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    species = make("big_bird", max_position_embeddings=512, **sparse)
    saved(species, tmp_path, AutoModelForSequenceClassification)
    options = TeacherOptions((str(tmp_path),), "sequence-classification", device="cpu")
    teacher = Teacher(options, 2)
    teacher.probe(class_rows(9, 7, 5))
    for lengths in ((80, 80, 66, 28, 20), (20, 9), (50, 20)):
        rows = class_rows(*lengths)
        want = []
        for row in rows:
            model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            with torch.inference_mode():
                want.append(model(input_ids=ids).logits)
        got = torch.cat([z.clone() for z in teacher.logits(rows)])
        torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=1e-4)


def test_a_student_forgets_the_length_of_earlier_batches(folder: Path) -> None:
    student = load_student(str(folder), StudentInfo("causal-lm", 64, max_length=LONG)).eval()
    for length in (LONG, 50, 20):
        (row,) = rows_of(length)
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            torch.testing.assert_close(student(input_ids=ids).logits[0], alone(folder, row))


def test_a_student_is_saved_in_the_scale_in_which_it_is_trained(tmp_path: Path) -> None:
    """RWKV divides weights in evaluation: a run that evaluated last saved another student."""
    saved(make("rwkv", num_hidden_layers=4, rescale_every=2), tmp_path / "model")
    student = load_student(str(tmp_path / "model"), StudentInfo("causal-lm", 64))
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    (row,) = rows_of(9)
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        evaluated = student.eval()(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        want = own(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(evaluated, want, rtol=1e-3, atol=1e-4)


def test_an_evaluation_leaves_the_capacity_of_experts_alone(tmp_path: Path) -> None:
    """NLLB-MoE went on to train with the capacity of the last batch that was evaluated."""
    sparse = {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_experts": 4}
    species = make("nllb-moe", decoder_start_token_id=2, **sparse)
    saved(species, tmp_path / "model", AutoModelForSeq2SeqLM)
    student = load_student(str(tmp_path / "model"), StudentInfo("seq2seq-lm", 64))

    def logits(length: int) -> torch.Tensor:
        (row,) = rows_of(length)
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            return student(input_ids=ids, decoder_input_ids=ids).logits  # type: ignore[no-any-return]

    want = logits(30)
    student.eval()
    logits(2)
    student.train()
    torch.testing.assert_close(logits(30), want, rtol=0, atol=1e-5)


def test_few_batches_are_cut(folder: Path) -> None:
    classify = length_class(AutoModelForCausalLM.from_pretrained(folder))
    assert classify is not None
    assert classify(1) == classify(ORIGINAL) != classify(ORIGINAL + 1)
    dynamic = "llama" in AutoConfig.from_pretrained(folder).model_type
    assert (classify(40) != classify(50)) == dynamic


@pytest.fixture
def caches(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of rows that are all of one side, and of both."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w1"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w1"
    ).save_pretrained(folder)
    out = tmp_path_factory.mktemp("caches")
    for name, lengths in (("short", [20, 20]), ("both", [20, 50])):
        lines = [" ".join(f"w{3 + (i + n) % 50}" for i in range(n)) for n in lengths]
        (out / f"{name}.jsonl").write_text("".join(f'{{"text": "{x}"}}\n' for x in lines))
        options = BuildOptions(
            (str(folder),),
            (str(out / f"{name}.jsonl"),),
            str(out / name),
            codec="dense",
            packing="none",
            max_length=LONG,
            workers=0,
        )
        build(options)
    return [str(out / "short"), str(out / "both")]


@pytest.mark.slow
def test_train_says_that_long_rows_change_how_short_ones_are_read(
    folder: Path,
    caches: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the rows that a student is tried on are too short to show it: else it is refused."""
    monkeypatch.setattr("kdcache.student.padding.TOKENS", 16)
    out = tmp_path_factory.mktemp("runs")
    for cache, size, said in ((caches[0], 2, 0), (caches[1], 2, 1), (caches[1], 1, 0)):
        lines: list[str] = []
        options = TrainOptions(
            cache=(cache,),
            student=str(folder),
            out=str(out / f"{len(list(out.iterdir()))}"),
            batch_size=size,
            max_steps=1,
            report_to="none",
        )
        train(options, report=lines.append)
        assert sum("otherwise in a batch with longer ones" in line for line in lines) == said


@pytest.mark.slow
def test_figures_of_a_student_do_not_depend_on_its_batches(folder: Path, caches: list[str]) -> None:
    found = []
    for budget in (1, 10_000):
        options = EvaluateOptions(student=(str(folder),), cache=caches[1], batch_tokens=budget)
        found += [one.kl for one in evaluate(options).models if one.role == "student"]
    assert found == pytest.approx([0, 0], abs=1e-5)
