"""Every architecture of the zoo gives the numbers of its own forward: as a teacher, as a student,
in evaluation and in prediction.

The reference is always the model itself on one row alone: no batch, no padding, no mask, plain
autograd.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from task_examples import LOSSES
from torch import Tensor
from zoo import (
    BIDIRECTIONAL,
    CAUSAL,
    CLASSES,
    CLASSIFIERS,
    HEADS,
    MASKED,
    PAD,
    SEQ2SEQ,
    TAGGERS,
    TYPICAL,
    UNPADDED,
    Species,
    forms,
    make,
)

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import EvaluateOptions, PredictOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.targets import DenseTargets
from kdcache.tasks import (
    CAUSAL_LM,
    IGNORE,
    MASKED_LM,
    MULTI_LABEL_CLASSIFICATION,
    REGRESSION,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TASKS,
    TOKEN_CLASSIFICATION,
)

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.filterwarnings("default"),  # architectures have warnings of their own
]
ALPHA, TEMPERATURE = 0.3, 2.0
CLOSE = {"rtol": 0, "atol": 2e-4}


@dataclass(frozen=True)
class Den:
    """What the animals of one task share.

    Attributes:
        task: the task.
        tokenizer: of all.
        corpus: a few texts of different lengths, with labels.
        cache: of another teacher, to train and to evaluate on.
        rows: its rows, with the logits of that teacher.
    """

    task: str
    tokenizer: Any
    corpus: Path
    cache: kdcache.Cache
    rows: list[tuple[Row, Tensor]]

    @property
    def causal(self) -> bool:
        return self.task == CAUSAL_LM

    @property
    def per_token(self) -> bool:
        return TASKS[self.task].per_token

    @property
    def temperature(self) -> float:
        return TEMPERATURE if TASKS[self.task].has_temperature else 1.0

    def save(self, species: Species, folder: Path, **more: Any) -> Path:
        names = dict(enumerate(CLASSES if self.task != REGRESSION else ("LABEL_0",)))
        if TASKS[self.task].problem:
            more |= {"problem_type": TASKS[self.task].problem}
        if not TASKS[self.task].over_ids:
            more |= {"id2label": names, "label2id": {v: k for k, v in names.items()}}
        return species.save(folder, self.auto, self.tokenizer, **more)

    @property
    def auto(self) -> Any:
        return getattr(transformers, TASKS[self.task].auto)

    def build(self, teacher: Path, out: Path, **more: Any) -> kdcache.Cache:
        kdcache.build(_build_options(self.task, self.corpus, teacher, out, **more))
        return kdcache.Cache.open(str(out))

    def own(self, model: Any, row: Row, width: int) -> Tensor:
        """Logits [n, width] of a row's positions by the model's own forward on it alone."""
        # RWKV can be differentiated only so.
        options = {"use_cache": False} if self.causal else {}
        (logits,) = model(input_ids=torch.from_numpy(row.input_ids).long()[None], **options).logits
        if not self.per_token:
            return logits[None]
        return logits[: len(row.labels)][torch.from_numpy(row.labels != IGNORE)][:, :width]


def _build_options(task: str, corpus: Path, teacher: Path, out: Path, **more: Any) -> BuildOptions:
    return BuildOptions(
        teacher=(str(teacher),),
        corpus=(str(corpus),),
        out=str(out),
        task=task,
        **{"codec": "dense", "packing": "none", "max_length": 64, "workers": 0, **more},
    )


def rows_of(cache: kdcache.Cache, temperature: float = 1.0) -> Iterator[tuple[Row, Tensor]]:
    """Rows of a dense cache with their logits."""
    dataset = kdcache.TargetDataset([cache])
    for data in (dataset[i] for i in range(len(dataset))):
        yield data.row(0), data.targets.at(temperature).logits


Dens = Callable[[str], Den]


@pytest.fixture(scope="module")
def dens(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Dens:
    """The den of each task, made when a test first asks for it."""
    return functools.cache(lambda task: _den(task, corpus_texts, tmp_path_factory.mktemp("den")))


@pytest.fixture
def field(dens: Dens) -> Den:
    """The den of the language models."""
    return dens(CAUSAL_LM)


def _den(task: str, texts: list[str], folder: Path) -> Den:
    # Encoder-decoders classify by the end of a text.
    tokenizer = byte_tokenizer(texts, mask=task == MASKED_LM, ends=TASKS[task].texts)
    assert tokenizer.pad_token_id == PAD
    corpus = folder / "texts.jsonl"
    lines: list[dict[str, Any]] = [
        {"text": text[:size], "label": i % 3}
        for i, (text, size) in enumerate(zip(texts, (5, 90, 33, 14, 60, 8), strict=False))
    ]
    if task == MULTI_LABEL_CLASSIFICATION:
        labels = ([], [0], None, [1, 2], [1], [0])
        lines = [{**line, "label": y} for line, y in zip(lines, labels, strict=True)]
    if task == REGRESSION:
        lines[2]["label"] = None
    if task == TOKEN_CLASSIFICATION:
        words = [line["text"].split() for line in lines]
        lines = [
            {"tokens": own, "tags": [None if i % 4 == 3 else i % 3 for i in range(len(own))]}
            for own in words
        ]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    empty: Any = None
    den = Den(task, tokenizer, corpus, empty, [])
    teacher = den.save(make("llama" if den.causal else "bert"), folder / "teacher", seed=5)
    cache = den.build(teacher, folder / "cache", temperatures=(den.temperature,))
    return Den(task, tokenizer, corpus, cache, list(rows_of(cache, den.temperature)))


def check_teacher(den: Den, folder: Path, model: Any, out: Path) -> None:
    """What is cached is what the model gives for each row alone."""
    cache = den.build(folder, out)
    with torch.inference_mode():
        for row, cached in rows_of(cache):
            want = den.own(model, row, cache.spec.vocab_size)
            scale = max(1.0, float(want.abs().max()))
            torch.testing.assert_close(cached / scale, want / scale, **CLOSE)


def reference_loss(den: Den, model: Any) -> Any:
    """The reference loss of the den's rows on the model's own logits, row by row."""
    width = den.cache.spec.vocab_size
    logits = torch.cat([den.own(model, row, width) for row, _ in den.rows])
    labels = [torch.from_numpy(row.labels) for row, _ in den.rows]
    labels = [x[x != IGNORE].long() if den.per_token else x for x in labels]
    targets = DenseTargets(torch.cat([targets for _, targets in den.rows]), den.temperature)
    answers = TASKS[den.task].answers
    return LOSSES[answers](logits, torch.cat(labels), targets, alpha=ALPHA)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
    }
    model.zero_grad()
    return {name: grad.clone() for name, grad in found.items()}


def check_student(den: Den, model: Any) -> float:
    """Loss and all gradients of a padded batch are those of the rows by themselves."""
    dataset = kdcache.TargetDataset([den.cache])
    collate = kdcache.Collator(pad_id=den.cache.spec.pad_id, temperature=den.temperature)
    student = kdcache.DistilledStudent(
        model,
        den.task,
        alpha=ALPHA,
        vocab_size=den.cache.spec.vocab_size,
    ).eval()
    got = student(**collate([dataset[i] for i in range(len(dataset))])).loss
    got.backward()
    mine = gradients(model)
    want = reference_loss(den, model).total
    want.backward()
    own = gradients(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    largest = max(float(grad.abs().max()) for grad in own.values())
    assert largest > 1e-3
    off = {name: float((mine[name] - grad).abs().max()) / largest for name, grad in own.items()}
    assert {name: error for name, error in off.items() if not error < 2e-4} == {}
    return float(want.detach())


def check_evaluation(den: Den, folder: Path, model: Any) -> None:
    """Cross-entropy and KL are those of the model's own logits."""
    result = kdcache.evaluate(
        EvaluateOptions(student=(str(folder),), cache=den.cache.url, temperature=den.temperature)
    )
    (scores,) = [one for one in result.models if one.role == "student"]
    with torch.inference_mode():
        want = reference_loss(den, model)
    # The loss is a mean over positions, the figure one over those with a hard label.
    share = result.labelled / result.positions
    hard, soft = scores.cross_entropy, scores.kl
    if den.task == REGRESSION:
        hard, soft = scores.mse, scores.teacher_mse
    assert hard == pytest.approx(float(want.hard) / share, rel=1e-4, abs=1e-5)
    assert soft == pytest.approx(float(want.soft) / den.temperature**2, rel=1e-4, abs=1e-5)


def train(den: Den, student: Path, out: Path) -> Any:
    """One step on all rows of the den."""
    return kdcache.train(
        TrainOptions(
            cache=(den.cache.url,),
            student=str(student),
            out=str(out),
            alpha=ALPHA,
            temperature=den.temperature,
            batch_size=len(den.rows),
            max_steps=1,
            report_to="none",
        )
    )


def check_prediction(den: Den, folder: Path, out: Path) -> None:
    """Probabilities are those of the model's own logits."""
    model = den.auto.from_pretrained(folder).eval()
    kdcache.predict(PredictOptions(student=str(folder), corpus=(str(den.corpus),), out=str(out)))
    got = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(got) == len(den.rows)
    for line, (row, _) in zip(got, den.rows, strict=True):
        with torch.inference_mode():
            want = den.own(model, row, 0)[0].softmax(-1)
        mine = torch.tensor([line["probabilities"][name] for name in CLASSES])
        torch.testing.assert_close(mine, want, **CLOSE)


def load(den: Den, folder: Path) -> Any:
    return den.auto.from_pretrained(folder).eval()


def of_tasks(herds: dict[str, list[Species]]) -> list[Any]:
    """Parameters `task` and `species`."""
    return [
        pytest.param(task, *one.values, id=f"{task}-{one.id}", marks=one.marks)
        for task, herd in herds.items()
        for one in forms(herd, task)
    ]


HERDS = {
    CAUSAL_LM: CAUSAL,
    SEQUENCE_CLASSIFICATION: CLASSIFIERS,
    TOKEN_CLASSIFICATION: TAGGERS,
    MASKED_LM: MASKED,
    MULTI_LABEL_CLASSIFICATION: HEADS,
    REGRESSION: HEADS,
}


@pytest.mark.parametrize(("task", "species"), of_tasks(HERDS))
def test_a_model_gives_its_own_numbers(
    task: str, species: Species, dens: Dens, tmp_path: Path
) -> None:
    den, run = dens(task), tmp_path / "run"
    # Decoders have a dropout before the head of a tagger by default.
    more = {"classifier_dropout": 0.0} if task == TOKEN_CLASSIFICATION else {}
    folder = den.save(species, tmp_path / "model", **more)
    model = load(den, folder)
    check_teacher(den, folder, model, tmp_path / "cache")
    loss = check_student(den, model)
    assert train(den, folder, run).loss == pytest.approx(loss, rel=1e-3)
    check_evaluation(den, run, load(den, run))
    if task == SEQUENCE_CLASSIFICATION:
        check_prediction(den, run, tmp_path / "predictions.jsonl")


@pytest.mark.parametrize("species", forms(BIDIRECTIONAL, SEQUENCE_CLASSIFICATION))
def test_a_masked_language_model_is_refused(species: Species, field: Den, tmp_path: Path) -> None:
    folder = field.save(species, tmp_path / "model")
    with pytest.raises(UsageError, match="is not a causal language model") as error:
        field.build(folder, tmp_path / "cache")
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="is not a causal language model"):
        train(field, folder, tmp_path / "run")
    with pytest.raises(UsageError, match="is not a causal language model|saved for masked-lm"):
        check_evaluation(field, folder, None)


# XLNet names -1 as its bound of positions, and CANINE embeds no ids.
UNBOUND = [
    make("xlnet", max_position_embeddings=None, d_head=8),
    make("canine", num_hash_buckets=64, local_transformer_stride=16),
]


DISTURBED = {
    SEQUENCE_CLASSIFICATION: [*UNPADDED, *UNBOUND],
    TOKEN_CLASSIFICATION: [UNPADDED[0], *UNPADDED[2:]],
}


@pytest.mark.parametrize(("task", "species"), of_tasks(DISTURBED))
def test_a_model_that_padding_disturbs_gets_none(
    task: str, species: Species, dens: Dens, tmp_path: Path
) -> None:
    den = dens(task)
    folder = den.save(species, tmp_path / "model")
    model = load(den, folder)
    check_teacher(den, folder, model, tmp_path / "cache")
    check_evaluation(den, folder, model)
    with pytest.raises(UsageError, match="other logits where its batch is padded"):
        train(den, folder, tmp_path / "run")


def test_a_perceiver_answers_at_more_places_than_it_reads(dens: Dens, tmp_path: Path) -> None:
    garden = dens(MASKED_LM)
    latents = {"num_latents": 4, "d_latents": 32, "num_self_attends_per_block": 1}
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    folder = garden.save(make("perceiver", **latents, **heads), tmp_path / "model")
    model = load(garden, folder)
    check_teacher(garden, folder, model, tmp_path / "cache")
    loss = check_student(garden, model)
    assert train(garden, folder, tmp_path / "run").loss == pytest.approx(loss, rel=1e-3)


def test_it_has_enough_of_each() -> None:
    assert len({one.model_type for one in CAUSAL}) >= 100
    assert len({one.model_type for one in CLASSIFIERS}) >= 80
    assert len({one.model_type for one in MASKED}) >= 30
    herds = (CAUSAL, [*CLASSIFIERS, *UNPADDED, *UNBOUND], [*TAGGERS, *UNPADDED], MASKED, SEQ2SEQ)
    tasks = (CAUSAL_LM, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, MASKED_LM, SEQ2SEQ_LM)
    for task, herd in zip(tasks, herds, strict=True):
        assert {*TYPICAL[task]} <= {*map(str, herd)}
