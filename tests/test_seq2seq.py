"""What only sequence-to-sequence models have: sources, the first token of the decoder, languages,
and generation.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_examples import EXAMPLES, Desk, built, check_refused, make_desk, rows_of
from task_examples import save as save_model
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    FSMTConfig,
    GPT2Config,
    MarianConfig,
    MBartConfig,
    MBartTokenizer,
    T5Config,
)
from zoo import SEQ2SEQ, Species, forms

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.options import EvaluateOptions, InspectOptions, PredictOptions
from kdcache.errors import UsageError
from kdcache.loss import distillation_loss
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.spec import LAST_LABEL
from kdcache.student.saved import SavedModel
from kdcache.targets import DenseTargets
from kdcache.teacher import TeacherFiles, TeacherOptions
from kdcache.teacher.model import TeacherModel

pytestmark = pytest.mark.slow

TASK = "seq2seq-lm"
WORDPIECE = Path(__file__).parent / "tiny_tokenizers" / "wordpiece"
IDS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
BART = {
    **IDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_position_embeddings": 98, "init_std": 0.3, "dropout": 0.0, "decoder_start_token_id": 3,
    "forced_eos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A T5, and a BART whose decoder reads another token first."""
    return make_desk(TASK, corpus_texts, tmp_path_factory.mktemp("pairs"))


def save(folder: Path, config: Any, auto: Any = AutoModelForSeq2SeqLM) -> Path:
    return save_model(folder, config, auto, "wordpiece")


def random_rows(seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for source, target in ((9, 7), (5, 12), (12, 3), (7, 7), (1, 1)):
        labels = rng.integers(5, 290, target).astype(np.int32)
        decoder = np.concatenate([[2], labels[:-1]]).astype(np.int32)
        rows.append(Row(decoder, labels, source=rng.integers(5, 290, source).astype(np.int32)))
    return rows


@pytest.mark.parametrize("species", forms(SEQ2SEQ, TASK))
def test_every_architecture_gives_its_own_numbers(species: Species) -> None:
    """A teacher's slices are the logits of its own forward on labels; a student's fused loss and
    its gradients are those of a reference in float64 on its own logits.
    """
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(species.config()).eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.2 * torch.randn_like(weight)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias += torch.randn_like(model.final_logits_bias)
    rows, desk = random_rows(), Desk(TASK, Path())
    one = TeacherModel(model, str(species), TeacherOptions((str(species),), TASK), 300)
    with torch.inference_mode():
        one.probe(rows)
        got = torch.cat([piece.logits for piece in one.slices(rows)])
        want = torch.cat([desk.own(model, row) for row in rows])[:, :300]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    plain = species.model_type != "prophetnet"  # whose logits are of several streams
    assert one.direct is plain

    targets = DenseTargets(2 * torch.randn(len(want), 300).double(), 2.0)
    labels = desk.labels(rows).long()
    logits = torch.cat([desk.own(model, row) for row in rows])[:, :300]
    reference = distillation_loss(logits.double(), labels, targets, alpha=0.3)
    reference.total.backward()
    wanted = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    distilled = kdcache.DistilledStudent(model, TASK, alpha=0.3, vocab_size=300).eval()
    total = 0.0
    for row, first in zip(rows, np.cumsum([0, *(len(r.labels) for r in rows)]), strict=False):
        assert row.source is not None
        part = DenseTargets(targets.logits[first : first + len(row.labels)].float(), 2.0)
        loss = distilled(
            input_ids=torch.from_numpy(row.source).long()[None],
            decoder_input_ids=torch.from_numpy(row.input_ids).long()[None],
            labels=torch.from_numpy(row.labels).long()[None],
            targets=part,
            count=float(len(labels)),
        ).loss
        loss.backward()
        total += float(loss.detach())
    assert (distilled._projection is not None and distilled._projection.layer is not None) is plain
    assert total == pytest.approx(float(reference.total.detach()), rel=1e-4)
    for name, grad in wanted.items():
        mine = dict(model.named_parameters())[name].grad
        assert mine is not None
        torch.testing.assert_close(mine, grad, rtol=1e-3, atol=1e-4, msg=name)


def test_finetune_makes_a_teacher_and_predict_writes_what_it_generates(
    desk: Desk, tmp_path: Path
) -> None:
    """And what it writes is a corpus."""
    out, pairs = tmp_path / "tuned", (desk / "corpus.jsonl",)
    given: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-3, "max_length": 48}
    made = kdcache.finetune(
        FinetuneOptions(desk / "teacher", pairs, str(out), pairs, task=TASK, epochs=2, **given)
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    rows = rows_of(desk.cache())
    before = functional.cross_entropy(
        desk.answers(desk / "teacher", rows), desk.labels(rows).long()
    )
    assert made.cross_entropy is not None
    assert made.cross_entropy < before - 0.5

    for beams, budget in ((1, None), (3, None), (3, 1)):
        file = tmp_path / f"written-{beams}.jsonl"
        done = kdcache.predict(
            PredictOptions(
                str(out), pairs, str(file), max_length=9, beams=beams, batch_tokens=budget
            )
        )
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        sources = [record["source"] for record in desk.records()]
        assert [line["source"] for line in lines] == sources
        tokenizer = AutoTokenizer.from_pretrained(out)
        ends = same = 0
        for line in lines:
            ids = torch.tensor([tokenizer(line["source"])["input_ids"]])
            want = model.generate(ids, max_new_tokens=9, num_beams=beams, do_sample=False)[0]
            ends += 3 in want[1:]
            same += line["target"] == tokenizer.decode(want, skip_special_tokens=True).strip()
        # Of a batch two ids may be as probable as each other, up to rounding.
        assert same == len(sources) if budget == 1 else same >= 0.9 * len(sources)
        assert done.records == len(sources)
        assert abs(done.unfinished - (len(sources) - ends)) <= len(sources) - same
    assert kdcache.predict(
        PredictOptions(str(out), ("-",), max_length=4), lines=["a b\n", "\n"], output=io.StringIO()
    ).records == 2  # fmt: skip
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(f"{json.dumps(line)}\n" for line in lines if line["target"]))
    own = built(desk.options(tmp_path / "own", corpus=(str(kept),), teacher=(str(out),)))
    assert own.manifest.rows > 0


def test_languages_are_marked_as_the_tokenizer_does() -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581a", "\u2581b", "\u2581", "a", "b"]
    tokenizer = MBartTokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)])
    spec = RowSpec(
        TASK, packing="none", decoder_start=LAST_LABEL, source_lang="fr_XX", target_lang="ro_RO"
    )
    record = kdcache.corpus.Record({"source": "a b", "target": "b"}, "f", 0)
    (row,) = make_encoder(spec, tokenizer).encode([record])
    assert row.source is not None
    shown = tokenizer.convert_ids_to_tokens
    assert shown(row.source.tolist()) == ["\u2581a", "\u2581b", "</s>", "fr_XX"]
    assert shown(row.labels.tolist()) == ["\u2581b", "</s>", "ro_RO"]
    assert shown(row.input_ids.tolist()) == ["ro_RO", "\u2581b", "</s>"]
    for wrong in ({"source_lang": "xx"}, {"target_lang": "french"}):
        with pytest.raises(UsageError, match="which MBartTokenizer does not know"):
            make_encoder(dataclasses.replace(spec, **wrong), tokenizer)


def test_what_a_model_reads_is_bounded_by_its_tables_alone(tmp_path: Path) -> None:
    def reach(**config: Any) -> int | None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", **config}))
        return SavedModel("m", TeacherFiles("m", tmp_path)).reach

    buckets = {"relative_attention_num_buckets": 32}
    assert reach(n_positions=512, **buckets) is None
    assert reach(max_position_embeddings=514, **buckets) == 514  # as MPNet, which adds them
    assert reach(n_positions=512) == 512
    assert reach(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32) == 32


def test_long_rows_are_cut_and_counted_and_others_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(WORDPIECE)
    texts = [("a b c d e f", "c b"), ("a b", "a b c d e f g"), ("a", "b"), ("", " ")]

    def encoded(**more: Any) -> tuple[Any, list[Row]]:
        spec = RowSpec(
            TASK, packing=more.pop("packing", "none"), max_length=6, max_source_length=6,
            decoder_start=more.pop("start", 9), **more,
        )  # fmt: skip
        encoder = make_encoder(spec, tokenizer)
        records = [
            kdcache.corpus.Record({"source": s, "target": t}, "f", i)
            for i, (s, t) in enumerate(texts)
        ]
        return encoder, list(encoder.encode(records))

    encoder, rows = encoded()
    assert (encoder.truncated, encoder.empty, len(rows)) == (2, 1, 3)
    whole = tokenizer("a b c d e f g")["input_ids"]
    assert rows[0].source is not None
    assert rows[0].source.tolist() == [*tokenizer("a b c d e f")["input_ids"][:5], 3]
    assert rows[1].labels.tolist() == whole[:6]
    assert rows[1].input_ids.tolist() == [9, *whole[:5]]
    _, rows = encoded(start=LAST_LABEL)
    assert rows[1].labels.tolist() == [*whole[:5], 3]
    assert rows[1].input_ids.tolist() == [3, *whole[:5]]
    encoder, rows = encoded(packing="whole", on_error="skip")
    assert (encoder.skipped, len(rows)) == (2, 1)
    texts = [("a b", "b")]
    _, want = encoded()
    spec = RowSpec(
        TASK, packing="none", decoder_start=9, source_column="of.en", target_column="of.de"
    )
    assert spec.columns == ("of.en", "of", "of.de")
    nested = kdcache.corpus.Record({"of": {"en": "a b", "de": "b"}}, "f", 0)
    (row,) = make_encoder(spec, tokenizer).encode([nested])
    assert row.source is not None
    assert row.source.tolist() == tokenizer("a b")["input_ids"]
    assert np.array_equal(row.labels, want[0].labels)
    with pytest.raises(UsageError, match="--columns target=THEIRS"):
        list(
            make_encoder(spec, tokenizer).encode(
                [dataclasses.replace(nested, values={"of": {"en": "a"}})]
            )
        )
    texts = [("a b c d e f", "c b")]
    with pytest.raises(UsageError, match="source has 8 tokens, --seq2seq max-source-length is 6"):
        encoded(packing="whole")


def test_wrong_input_is_refused_in_one_line(desk: Desk, tmp_path: Path) -> None:
    gpt2 = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    causal = save(tmp_path / "gpt2", gpt2, AutoModelForCausalLM)
    fsmt = FSMTConfig(
        langs=["a", "b"], src_vocab_size=259, tgt_vocab_size=259, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=66,
    )  # fmt: skip
    unshifted = save(tmp_path / "fsmt", fsmt)
    sides = MarianConfig(
        **{**BART, "share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    )
    two = save(tmp_path / "two", sides)
    t5 = {**IDS, "d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    lost = save(tmp_path / "lost", T5Config(**t5, decoder_start_token_id=4000))
    mbart = save(tmp_path / "mbart", MBartConfig(**{**BART, "decoder_start_token_id": None}))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    foreign = save(tmp_path / "foreign", BartConfig(**BART))
    tokenizer = AutoTokenizer.from_pretrained(WORDPIECE)
    vocab = tokenizer.get_vocab()
    state = json.loads((foreign / "tokenizer.json").read_text())
    words = sorted(vocab, key=vocab.__getitem__)
    turned = [*words[:10], *words[10:][::-1]]
    state["model"]["vocab"] = {word: i for i, word in enumerate(turned)}
    (foreign / "tokenizer.json").write_text(json.dumps(state))
    cache, student, build_options = desk.cache(), desk / "student", desk.options("l")

    def corpus(name: str, record: dict[str, Any]) -> Path:
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(record) + "\n")
        return file

    def train(name: Any, **more: Any) -> None:
        desk.try_training(name, tmp_path / "run", **more)

    def build(name: str, **more: Any) -> None:
        desk.try_build(tmp_path / name, **more)

    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: build("a", teacher=causal), "no model for seq2seq-lm"),
        (lambda: build("b", teacher=unshifted), "its forward on labels fails"),
        (lambda: build("b2", teacher=two), "has a vocabulary for each side"),
        (lambda: build("c", teacher=lost), "gives its decoder [4000,"),
        (
            lambda: build("d", corpus=corpus("d", {"source": "a", "target": ""})),
            "column 'target' is empty",
        ),
        (lambda: build("e", corpus=corpus("e", {"source": "a"})), "--columns target=THEIRS"),
        (
            lambda: build("f", corpus=corpus("f", {"source": "a", "target": 7})),
            "column 'target' holds a number where text was expected",
        ),
        (lambda: build("g", packing="concat"), "seq2seq-lm has a row for each record"),
        (lambda: build("h", engine="vllm"), "not with --task seq2seq-lm"),
        (lambda: build("i", teacher=student, max_length=100), "reads at most 98 tokens"),
        (
            lambda: build("j", teacher=student, max_source_length=100),
            "--seq2seq max-source-length is 100, but teacher",
        ),
        (lambda: build("k", target_lang="de_DE"), "marks no languages"),
        (
            lambda: kdcache.build(dataclasses.replace(build_options, task="causal-lm")),
            "no model for causal-lm",
        ),
        (
            lambda: kdcache.build(
                dataclasses.replace(
                    desk.options(tmp_path / "m", max_source_length=9), task="masked-lm"
                )
            ),
            "no model for masked-lm",
        ),
        (lambda: train(other), "not a seq2seq-lm architecture"),
        (lambda: train(causal), "cannot be loaded as a seq2seq-lm model"),
        (lambda: train(foreign), "has another vocabulary"),
        (lambda: train("bilstm"), "bilstm is a classifier; for seq2seq-lm give"),
        (
            lambda: train(student, cross_tokenizer="likelihood"),
            "--cross-tokenizer is for causal language models. A student of this cache",
        ),
        (
            lambda: kdcache.evaluate(EvaluateOptions(student=(str(causal),), cache=cache.url)),
            "was saved for causal-lm, but seq2seq-lm is asked for",
        ),
    ]
    check_refused(cases)
    # A start that is the last label of each row, as a code of the language is.
    for row in rows_of(desk.cache(teacher=(str(mbart),))):
        assert row.input_ids[0] == row.labels[-1]


def test_an_answer_is_shown_with_the_labels_of_a_sure_teacher(desk: Desk, tmp_path: Path) -> None:
    """Whose soft targets `build --positions` does not keep."""
    shown = []
    for name, share in (("whole", None), ("some", 0.3)):
        options = BuildOptions(
            (str(desk.folder / "teacher"),), (str(desk.folder / "corpus.jsonl"),),
            str(tmp_path / name), task=TASK, workers=0, positions=share, **EXAMPLES[TASK].build,
        )  # fmt: skip
        cache = built(options)
        assert cache.spec.positions is None or 0 < cache.manifest.positions < cache.manifest.tokens
        row = kdcache.inspect(InspectOptions(cache.url, row=3)).row
        assert row is not None
        shown.append(row.text_pair)
    assert shown[0] == shown[1]
