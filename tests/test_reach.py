"""How far models read: every architecture of the zoo, and commands on its longest rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from zoo import CAUSAL, CLASSIFIERS, MASKED, PAD, SEQ2SEQ, TAGGERS, UNPADDED, Species, forms, make

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import EvaluateOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import UsageError
from kdcache.student.saved import SavedModel
from kdcache.tasks import CAUSAL_LM, MASKED_LM, SEQ2SEQ_LM, TASKS
from kdcache.teacher import TeacherFiles
from kdcache.teacher.quirks import reach as reach_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]  # architectures have warnings of their own
ZOO = {
    CAUSAL_LM: CAUSAL,
    MASKED_LM: MASKED,
    "sequence-classification": CLASSIFIERS + UNPADDED,
    "token-classification": TAGGERS,
}
ANIMALS = [
    pytest.param(task, *one.values, id=f"{task}-{one.id}", marks=one.marks)
    for task, some in ZOO.items()
    for one in forms(some, task)
]
LONGER = 140  # than any table here but whisper's


def auto_of(task: str) -> Any:
    return getattr(transformers, TASKS[task].auto)


def ids_of(length: int) -> torch.Tensor:
    ids = torch.randint(5, 290, (1, length))
    ids[:, -1] = 0  # the end, which some classifiers look for
    return ids


@pytest.mark.end_to_end
@pytest.mark.parametrize(("task", "species"), ANIMALS)
def test_a_model_reads_as_far_as_is_said_and_no_further(task: str, species: Species) -> None:
    config = species.config()
    model = auto_of(task).from_config(config).eval()
    options = {"use_cache": False} if task == CAUSAL_LM else {}

    def read(length: int) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids_of(length), **options).logits  # type: ignore[no-any-return]

    reach = reach_of(model)
    if species.model_type != "trocr":  # which has no model below its head
        assert reach_of(config) == reach
    assert read(reach or LONGER).isfinite().all()
    if (
        reach is not None and species.model_type != "tapas"
    ):  # whose last position is that of the rest
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            read(reach + 1)


@pytest.mark.end_to_end
@pytest.mark.parametrize("species", forms(SEQ2SEQ, SEQ2SEQ_LM))
def test_both_sides_of_a_model_read_as_far_as_is_said(species: Species) -> None:
    model = auto_of(SEQ2SEQ_LM).from_config(species.config()).eval()

    def read(source: int, target: int) -> torch.Tensor:
        with torch.inference_mode():
            found = model(input_ids=ids_of(source), decoder_input_ids=ids_of(target))
        return found.logits  # type: ignore[no-any-return]

    reach, sources = reach_of(model), reach_of(model, "encoder")
    assert read(sources or LONGER, reach or LONGER).isfinite().all()
    for bound, lengths in ((sources, ((sources or 0) + 1, 9)), (reach, (9, (reach or 0) + 1))):
        if bound is not None:
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                read(*lengths)


@pytest.fixture(scope="module")
def tokenizer(corpus_texts: list[str]) -> Any:
    found = byte_tokenizer(corpus_texts, mask=True)
    assert found.pad_token_id == PAD
    return found


@pytest.fixture(scope="module")
def corpus(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short texts, then a long one."""
    path = tmp_path_factory.mktemp("reach") / "texts.jsonl"
    texts = [*(text[:20] for text in corpus_texts[:3]), " ".join(corpus_texts)[:2000]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def build(task: str, teacher: Path, corpus: Path, out: Path, **more: Any) -> kdcache.Cache:
    options = {"codec": "dense", "packing": "none", "workers": 0, "temperatures": (1.0,), **more}
    kdcache.build(BuildOptions((str(teacher),), (str(corpus),), str(out), task=task, **options))
    return kdcache.Cache.open(str(out))


def longest(cache: kdcache.Cache) -> int:
    dataset = kdcache.TargetDataset([cache])
    return max(len(dataset[i].input_ids) for i in range(len(dataset)))


@pytest.mark.parametrize(
    ("task", "species", "reach"),
    [
        (CAUSAL_LM, make("roberta", is_decoder=True), 126),
        (CAUSAL_LM, make("mpt"), 128),
        (CAUSAL_LM, make("gptj"), 128),
        (MASKED_LM, make("xlm-roberta"), 126),
        (MASKED_LM, make("esm"), 126),
        (MASKED_LM, make("ibert"), 126),
    ],
    ids=str,
)
def test_the_longest_row_that_a_teacher_reads_is_built_and_evaluated(
    task: str, species: Species, reach: int, tokenizer: Any, corpus: Path, tmp_path: Path
) -> None:
    folder = species.save(tmp_path / "model", auto_of(task), tokenizer)
    cache = build(task, folder, corpus, tmp_path / "cache")
    assert longest(cache) == reach
    assert SavedModel("m", TeacherFiles("m", folder)).reach == reach
    with pytest.raises(UsageError, match=f"reads at most {reach} tokens. Set it to {reach}"):
        build(task, folder, corpus, tmp_path / "more", max_length=reach + 1)
    result = kdcache.evaluate(EvaluateOptions(student=(str(folder),), cache=cache.url))
    (scores,) = [one for one in result.models if one.role == "student"]
    assert scores.kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("which", ["cache", "eval_cache"])
def test_a_long_row_of_another_cache_is_refused_before_training(
    which: str, tokenizer: Any, corpus: Path, tmp_path: Path
) -> None:
    auto = auto_of(CAUSAL_LM)
    teacher = make("gpt2").save(tmp_path / "teacher", auto, tokenizer)
    student = make("gpt2", n_positions=64, max_position_embeddings=64).save(
        tmp_path / "student", auto, tokenizer
    )
    short = build(CAUSAL_LM, teacher, corpus, tmp_path / "short", max_length=64)
    long = build(CAUSAL_LM, teacher, corpus, tmp_path / "long", max_length=100)
    caches = {"cache": (short.url,)}
    caches[which] = (*caches.get(which, ()), long.url)
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="reads at most 64 tokens, and a row has 100"):
        kdcache.train(TrainOptions(**caches, student=str(student), out=str(out), report_to="none"))
    assert not (out / "metrics.jsonl").exists()


def test_a_long_target_is_refused_before_training(tokenizer: Any, tmp_path: Path) -> None:
    auto = auto_of(SEQ2SEQ_LM)
    start = {"decoder_start_token_id": 2}
    teacher = make("bart", **start).save(tmp_path / "teacher", auto, tokenizer)
    small = make("bart", max_position_embeddings=16, **start)
    student = small.save(tmp_path / "student", auto, tokenizer)
    for field, what, flag in (
        ("target", "row", "--max-length"),
        ("source", "source", "--seq2seq max-source-length"),
    ):
        corpus = tmp_path / f"{field}.jsonl"
        line = {"source": "a b", "target": "a", field: "a b c d " * 20}
        corpus.write_text(json.dumps(line) + "\n")
        cache = build(SEQ2SEQ_LM, teacher, corpus, tmp_path / f"cache-{field}")
        with pytest.raises(UsageError, match=f"at most 16 tokens, and a {what} has .* {flag}"):
            kdcache.train(
                TrainOptions(
                    cache=(cache.url,),
                    student=str(student),
                    out=str(tmp_path / "run"),
                    report_to="none",
                )
            )


@pytest.mark.parametrize("says", [{"return_dict": False}, {"output_attentions": True}], ids=str)
def test_what_a_model_gives_besides_logits_is_not_its_configuration_s_choice(
    says: dict[str, bool], tokenizer: Any, corpus: Path, tmp_path: Path
) -> None:
    folder = make("gpt2").save(tmp_path / "model", auto_of(CAUSAL_LM), tokenizer)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **says}))
    cache = build(CAUSAL_LM, folder, corpus, tmp_path / "cache", max_length=32)
    out = tmp_path / "run"
    kdcache.train(
        TrainOptions(
            cache=(cache.url,), student=str(folder), out=str(out), max_steps=1, report_to="none"
        )
    )
    assert (out / "train.json").exists()
