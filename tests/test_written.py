"""What the `generation_config.json` of a model says, and what `predict` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast
from zoo import make

import kdcache
from kdcache.commands.options import PredictOptions
from kdcache.commands.predict import Writer
from kdcache.errors import UsageError
from kdcache.student.saved import SavedModel

pytestmark = pytest.mark.slow

SEARCHES: list[tuple[int, dict[str, Any]]] = [  # beams, and what the file says besides
    (1, {"num_beams": 4, "num_return_sequences": 4}),
    (3, {"return_dict_in_generate": True, "output_scores": True}),
    (1, {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}),
    (1, {"penalty_alpha": 0.6, "top_k": 4}),
    (3, {"num_beam_groups": 2, "diversity_penalty": 1.0}),
    (1, {"prompt_lookup_num_tokens": 3}),
    (1, {"guidance_scale": 1.5}),
    (1, {"cache_implementation": "quantized"}),
    (3, {"low_memory": True}),
    (1, {"token_healing": True}),
    (3, {"force_words_ids": [[5]]}),
    (1, {"max_length": 3}),
]


@pytest.fixture
def model(corpus_texts: list[str], tmp_path: Path) -> Path:
    bpe = ByteLevelBPETokenizer()
    special = ["<|end|>", "<pad>"]
    bpe.train_from_iterator(corpus_texts, 300, special_tokens=special, show_progress=False)
    bpe._tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    names = dict(zip(("eos_token", "pad_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    species = make("t5", decoder_start_token_id=1)
    folder = species.save(tmp_path / "model", AutoModelForSeq2SeqLM, tokenizer)
    lines = [{"source": text[:30]} for text in corpus_texts[:5]]
    (tmp_path / "sources.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def written(folder: Path, beams: int) -> list[str]:
    out = folder.parent / "targets.jsonl"
    corpus = str(folder.parent / "sources.jsonl")
    kdcache.predict(PredictOptions(str(folder), (corpus,), str(out), max_length=8, beams=beams))
    return [json.loads(line)["target"] for line in out.read_text().splitlines()]


def say(folder: Path, **changes: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_search_is_that_of_the_options(model: Path) -> None:
    plain = {beams: written(model, beams) for beams in (1, 3)}
    before = (model / "generation_config.json").read_text()
    for beams, search in SEARCHES:
        say(model, **search)
        assert written(model, beams) == plain[beams], (search, beams)
        (model / "generation_config.json").write_text(before)


def test_what_it_says_of_the_tokens_of_a_target_holds(model: Path) -> None:
    say(model, forced_bos_token_id=7, stop_strings=["\u2603"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    assert all(target.startswith(tokenizer.decode([7])) for target in written(model, 1))


def test_one_that_transformers_refuses_is_one_line(model: Path) -> None:
    say(model, num_return_sequences=3)
    with pytest.raises(UsageError, match="num_return_sequences") as error:
        written(model, 1)
    assert "\n" not in str(error.value)


def test_sources_beyond_a_model_s_original_length_share_no_batch(model: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    sparse = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    species = make("bigbird_pegasus", decoder_start_token_id=1, **sparse)
    folder = species.save(model.parent / "sparse", AutoModelForSeq2SeqLM, tokenizer)
    options = PredictOptions(str(folder), ("-",), max_length=8)
    writer = Writer(options, SavedModel.find(str(folder)), "seq2seq-lm", "cpu")
    texts = ["a b c " * 30, "a b c " * 20, "a b", "a"]
    assert len(writer.write(texts)) == 4
    assert list(writer._batches(range(4), writer._rows(texts)[0])) == [[0], [1], [2, 3]]
