"""Fixtures shared by all tests: real models and data where this machine has them, tiny ones made
on the spot, a small build of them, and a Ray.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from environment import never_move_the_environment

if TYPE_CHECKING:
    from kdcache.commands.build.options import BuildOptions

never_move_the_environment()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests compute little at a time: threads that wait for each other take four times as long on two
# cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its workers what other processes leave of a core, and here others always compute.
os.environ.setdefault("RAY_worker_niceness", "0")
# The same suite on every machine: only `make test-gpu` sees a GPU.
if os.environ.get("KDCACHE_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

CLASSES = ("bad", "neutral", "good")
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start clusters and processes come first: of these the longest would end alone."""
    long = {item.path for item in items if item.get_closest_marker("end_to_end")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """The collector need not look at a million objects of libraries: every training calls it."""
    gc.freeze()


def further(*values: object) -> list[object]:
    """Values of a parameter that repeat a mechanism: for tests before a release."""
    mark = pytest.mark.exhaustive
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark)
        for value in values
    ]


@pytest.fixture(scope="session", autouse=True)
def _no_power_is_lost() -> Iterator[None]:
    """A sync waits milliseconds for the disk, and a training syncs thirty times: nothing here could
    lose what it keeps, since killed processes leave what they wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _warnings_are_logged() -> None:
    """Also after a command that ran quietly in this process."""
    logging.getLogger().setLevel(logging.WARNING)


def _asset(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real asset {'/'.join(parts)} is not on this machine")
    return path


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A 260 k parameter Llama with a vocabulary of 512."""
    return _asset("assets", "stories260k")


@pytest.fixture(scope="session")
def minilm_sst2() -> Path:
    """A BERT classifier (6 layers) fine-tuned on SST-2."""
    return _asset("assets", "minilm-sst2")


@pytest.fixture(scope="session")
def sst2() -> Path:
    """Folder with train.tsv, dev.tsv, test.tsv: text TAB label, no header."""
    return _asset("data", "sst2")


@pytest.fixture(scope="session")
def novels() -> Path:
    """15 novels as gzipped JSONL."""
    return _asset("data", "gutenberg", "novels.jsonl.gz")


@pytest.fixture(scope="session")
def corpus_texts() -> list[str]:
    """Paragraphs of the Python language reference, which every CPython carries."""
    from pydoc_data.topics import topics

    paragraphs = [p.strip() for text in topics.values() for p in text.split("\n\n")]
    return [p for p in paragraphs if len(p) > 40][:600]


@pytest.fixture(scope="session")
def tiny_tokenizer(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE tokenizer with 300 ids, `<|end|>` as its end of text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        corpus_texts, vocab_size=300, special_tokens=["<|end|>"], show_progress=False
    )
    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.save_pretrained(folder)
    return folder


def byte_tokenizer(texts: list[str], *, mask: bool = False, ends: bool = False) -> Any:
    """A byte-level BPE tokenizer of 300 ids with an end, a padding and if asked a mask; `ends`: it
    puts the end behind each text."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = {"eos_token": "<|end|>", "pad_token": "<pad>"}
    names |= {"mask_token": "<mask>"} if mask else {}
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 300, special_tokens=[*names.values()], show_progress=False)
    if ends:
        bpe._tokenizer.post_processor = TemplateProcessing(
            single="$A <|end|>", special_tokens=[("<|end|>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


def make_tiny_lm(tokenizer: Path, folder: Path, *, vocab_size: int = 300, seed: int = 0) -> Path:
    """Save a random two-layer Llama beside a copy of the tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,  # wide enough that distributions differ from uniform
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with a vocabulary of 300."""
    return make_tiny_lm(tiny_tokenizer, tmp_path_factory.mktemp("tiny-lm"))


def make_tiny_classifier(
    tokenizer: Path,
    folder: Path,
    names: tuple[str, ...] = CLASSES,
    *,
    layers: int = 2,
    hidden_size: int = 32,
    seed: int = 0,
) -> Path:
    """Save a random BERT classifier beside a copy of the tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=300,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 8,
        max_position_embeddings=128,
        pad_token_id=0,
        initializer_range=0.3,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    torch.manual_seed(seed)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_classifier(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT classifier: bad, neutral, good."""
    return make_tiny_classifier(tiny_tokenizer, tmp_path_factory.mktemp("tiny-classifier"))


@pytest.fixture(scope="session")
def student_classifier(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a smaller one with the same classes."""
    folder = tmp_path_factory.mktemp("student-classifier")
    return make_tiny_classifier(tiny_tokenizer, folder, layers=1, hidden_size=16, seed=7)


@pytest.fixture(scope="session")
def text_corpus(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 150 short documents."""
    import json

    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus_texts[:150]))
    return path


@pytest.fixture(scope="session")
def labelled_corpus(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSV file with a header, names as labels, and every fifth row without one."""
    lines = ["text\tlabel"]
    for i, text in enumerate(corpus_texts[:200]):
        label = "" if i % 5 == 4 else CLASSES[len(text) % 3]
        lines.append(f"{' '.join(text.split())}\t{label}")
    path = tmp_path_factory.mktemp("corpus") / "labelled.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def small_build(tiny_lm: Path, text_corpus: Path, tmp_path: Path) -> BuildOptions:
    """A build of short documents in this process: `dataclasses.replace` what a test is about."""
    from kdcache.commands.build.options import BuildOptions

    return BuildOptions(
        teacher=(str(tiny_lm),),
        corpus=(str(text_corpus),),
        out=str(tmp_path / "cache"),
        workers=0,
    )


def built(teacher: Path, corpus: Path, out: Path, **options: Any) -> str:
    """The folder of a cache, built in this process."""
    from kdcache.commands.build.build import build
    from kdcache.commands.build.options import BuildOptions

    build(BuildOptions((str(teacher),), (str(corpus),), str(out), workers=0, **options))
    return str(out)


@pytest.fixture(scope="session")
def class_cache(
    tiny_classifier: Path, labelled_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A cache of one shard: the tiny classifier over the labelled corpus. To be read only."""
    out = tmp_path_factory.mktemp("classes") / "cache"
    given = {"task": "sequence-classification", "max_length": 64}
    return built(tiny_classifier, labelled_corpus, out, **given)


@pytest.fixture(scope="session")
def lm_caches(
    tiny_lm: Path, text_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Caches of the tiny LM over the same documents, by codec. To be read only."""
    out = tmp_path_factory.mktemp("lm")
    given = {"temperatures": (1.0, 2.0), "max_length": 48, "limit": 60}
    return {
        codec: built(tiny_lm, text_corpus, out / codec, codec=codec, **given)
        for codec in ("dense", "topk:8", "sample:20")
    }


@pytest.fixture(scope="session")
def word_student(class_cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a biLSTM over words."""
    import torch

    from kdcache.cache import Cache
    from kdcache.student import BiLstmConfig, word_tokenizer
    from kdcache.student.bilstm import BiLstmForSequenceClassification

    data = Cache.open(class_cache).read(0)
    assert data.texts is not None
    words = word_tokenizer(data.texts)
    torch.manual_seed(3)
    config = BiLstmConfig(
        vocab_size=len(words),
        id2label=dict(enumerate(CLASSES)),
        embedding_size=8,
        hidden_size=6,
        dense_size=5,
    )
    run = tmp_path_factory.mktemp("run")
    model = BiLstmForSequenceClassification(config)
    model.tokenizer = words
    model.save_pretrained(run)
    return run


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
WORDPIECE = Path(__file__).resolve().parent / "tiny_tokenizers" / "wordpiece"


@pytest.fixture(scope="session")
def tiny_tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT tagger of persons and places."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

    tokenizer = AutoTokenizer.from_pretrained(WORDPIECE)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        id2label=dict(enumerate(TAGS)),
        label2id={name: i for i, name in enumerate(TAGS)},
    )
    folder = tmp_path_factory.mktemp("tiny-tagger")
    torch.manual_seed(0)
    BertForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tagged_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 90 sentences: some words have no tag, every third sentence has none."""
    import json
    import random

    draw = random.Random(0)
    words = ["the", "New York", "fox", "don't", "Paris", "Jumping", "over", "", "Smith", "."]
    lines = []
    for number in range(90):
        sentence = [draw.choice(words) for _ in range(draw.randint(1, 9))]
        tags = [None if draw.random() < 0.1 else draw.choice(TAGS) for _ in sentence]
        lines.append({"tokens": sentence, "ner_tags": None if number % 3 == 2 else tags})
    path = tmp_path_factory.mktemp("corpus") / "tagged.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def tag_caches(
    tiny_tagger: Path, tagged_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Caches of the tiny tagger, of three shards each, by `label_tokens`. To be read only."""
    out, third = tmp_path_factory.mktemp("tags"), tagged_corpus.stat().st_size // 12 + 1
    given = {"task": "token-classification", "shard_tokens": third}
    return {
        mode: built(tiny_tagger, tagged_corpus, out / mode, label_tokens=mode, **given)
        for mode in ("first", "all")
    }


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One Ray of two CPUs for the tests of a module."""
    import ray

    ray.init(  # "local": not the cluster that may be running on this machine
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
