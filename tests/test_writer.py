"""A model writes: draws, batches, ends, and log-probabilities against its forward in float64."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from zoo import CAUSAL, VOCABULARY, Species, forms

from kdcache.errors import UsageError
from kdcache.rows.spec import Answer, Sampling, text_of
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher.load import TeacherOptions
from kdcache.teacher.writer import Writer, draw, noise, truncated

SEED = 3


def writer(
    folder: Path, how: Sampling, batch_tokens: int = 4096, ends: tuple[int, ...] = ()
) -> Writer:
    return Writer(
        TeacherOptions((str(folder),), CAUSAL_LM),
        how,
        vocab_size=VOCABULARY,
        ends=ends,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_tokens=batch_tokens,
    )


def prompts(count: int = 9, least: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(SEED)
    sizes = [least + 5 * i % 14 for i in range(count)]
    return [rng.integers(2, VOCABULARY, size).astype(np.int32) for size in sizes]


def written(one: Writer, asked: list[np.ndarray], span: int = 4) -> list[Answer]:
    counted: list[int] = []
    answers = one.write(span, asked, counted.append)
    assert sorted(filter(None, counted)) == sorted(len(answer.ids) for answer in answers)
    return answers


@torch.inference_mode()
def scored(folder: Path, prompt: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities of an answer by the model's own forward on the whole text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    text = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))[None]
    try:
        logits = model(text, use_cache=False).logits
    except RuntimeError:  # experts have products of float32 alone
        logits = model.float()(text, use_cache=False).logits
    logits = logits[0, len(prompt) - 1 : -1, :VOCABULARY].double()
    drawn = text[0, len(prompt) :, None]
    return logits.log_softmax(-1).gather(-1, drawn)[:, 0].numpy()


@given(st.integers(0, 99), st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_truncation_is_that_of_transformers(seed: int, temperature: float, k: int) -> None:
    z = torch.randn(4, 40, generator=torch.Generator().manual_seed(seed)) * 3
    warm = TemperatureLogitsWarper(temperature)(None, z)
    for how, warper in (
        (Sampling(temperature=temperature, top_k=k), TopKLogitsWarper(k)),
        (Sampling(temperature=temperature, top_p=k / 41), TopPLogitsWarper(k / 41)),
        (Sampling(temperature=temperature, min_p=k / 41), MinPLogitsWarper(k / 41)),
    ):
        weights = truncated(z, how)
        want = warper(None, warm.clone()).double().softmax(-1)
        torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), want, rtol=0, atol=1e-6)


def test_draws_have_the_models_frequencies() -> None:
    z = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).double()
    count = 40_000
    u = torch.from_numpy(noise(SEED, 1, np.arange(count), 0, 5))
    how = Sampling(temperature=0.7, top_p=0.9)
    ids, logprobs = draw(z.expand(count, -1), u, how)
    weights = truncated(z, how)[0]
    found = torch.bincount(ids, minlength=12) / count
    assert float((found - weights / weights.sum()).abs().max()) < 0.01
    assert set(ids.tolist()) == set(torch.nonzero(weights)[:, 0].tolist())
    torch.testing.assert_close(logprobs.double(), z[0].log_softmax(-1)[ids], rtol=0, atol=1e-6)
    greedy, _ = draw(z, u[:1], Sampling(temperature=0))
    assert int(greedy) == int(z.argmax())


def test_noise_belongs_to_seed_span_prompt_sample_and_place() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3), -1).reshape(-1, 3)
    found = [noise(seed, span, *grid.T) for seed in range(2) for span in range(2)]
    assert len(np.unique(found)) == 4 * 64
    shuffled = np.random.default_rng(0).permutation(64)
    assert (noise(0, 1, *grid[shuffled].T) == found[1][shuffled]).all()


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> object:
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # architectures have warnings of their own
@pytest.mark.parametrize("species", forms(CAUSAL, CAUSAL_LM))
def test_an_architecture_writes_in_batches_what_it_writes_alone(
    species: Species, tokenizer: object, tmp_path: Path
) -> None:
    """Rows come and go, whatever keeps the past: the text is that of each prompt alone, and the
    log-probabilities are those of the model's own forward on the whole text, in float64."""
    species.save(tmp_path, AutoModelForCausalLM, tokenizer)
    how = Sampling(samples=2, max_new_tokens=14, seed=SEED, temperature=0.8)
    asked = prompts()
    alone = [a.ids.tolist() for a in written(writer(tmp_path, how, batch_tokens=1), asked)]
    ends: list[int] = []  # rare tokens, which half of the answers have
    for token, _ in reversed(Counter(chain.from_iterable(map(set, alone))).most_common()):
        if sum(not set(ends).isdisjoint(ids) for ids in alone) < len(alone) // 2:
            ends.append(token)
    batched = written(writer(tmp_path, how, batch_tokens=200, ends=tuple(ends)), asked)
    assert {answer.reason for answer in batched} == {"stop", "length"}
    cut = [next((i + 1 for i, token in enumerate(ids) if token in ends), 14) for ids in alone]
    same = [a.ids.tolist() == ids[:n] for a, ids, n in zip(batched, alone, cut, strict=True)]
    assert np.mean(same) > 0.9  # rounding may move a draw
    for i, answer in enumerate(batched):
        assert len(answer.ids) <= 14
        assert (answer.ids[-1] in ends) == (answer.reason == "stop")
        want = scored(tmp_path, asked[i // 2], answer.ids)
        np.testing.assert_allclose(answer.logprobs, want, rtol=0, atol=2e-3)


def test_batches_and_samples_do_not_matter(tiny_lm: Path) -> None:
    asked = prompts()
    how = Sampling(samples=3, max_new_tokens=12, seed=SEED)
    want = [a.ids.tolist() for a in written(writer(tiny_lm, how, 4096), asked)]
    for batch_tokens in (60, 300):
        found = [a.ids.tolist() for a in written(writer(tiny_lm, how, batch_tokens), asked)]
        assert found == want
    # Fewer samples are the first of more; another span has other answers.
    few = Sampling(samples=1, max_new_tokens=12, seed=SEED)
    assert [a.ids.tolist() for a in written(writer(tiny_lm, few), asked)] == want[::3]
    assert [a.ids.tolist() for a in written(writer(tiny_lm, few), asked, span=5)] != want[::3]


def test_greedy_text_is_that_of_transformers(stories260k: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    asked = [np.array(tokenizer(t)["input_ids"], np.int32) for t in ("Once upon a time", "Lily")]
    how = Sampling(temperature=0, max_new_tokens=40)
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    one = Writer(
        TeacherOptions((str(stories260k),), CAUSAL_LM),
        how,
        vocab_size=512,
        ends=(),
        tokenizer=tokenizer,
        batch_tokens=4096,
    )
    for prompt, answer in zip(asked, written(one, asked), strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        want = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=None,
        )
        assert answer.ids.tolist() == want[0, len(prompt) :].tolist()


def test_a_text_ends_an_answer(tiny_lm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    asked = prompts()
    free = written(writer(tiny_lm, Sampling(max_new_tokens=30, seed=SEED)), asked)
    texts = [text_of(tokenizer, answer.ids, ()) for answer in free]
    found = re.search("[ -~]{2}", texts[0][4:])  # no part of a letter of several bytes
    assert found
    stop = (found[0],)
    ended = written(writer(tiny_lm, Sampling(max_new_tokens=30, seed=SEED, stop=stop)), asked)
    for text, mine, theirs in zip(texts, ended, free, strict=True):
        assert mine.ids.tolist() == theirs.ids[: len(mine.ids)].tolist()
        assert (mine.reason == "stop") == (stop[0] in text)
        assert text_of(tokenizer, mine.ids, stop) == text.partition(stop[0])[0]


def test_a_batch_that_does_not_fit_is_halved(tiny_lm: Path) -> None:
    asked = prompts()
    how = Sampling(samples=2, max_new_tokens=12, seed=SEED)
    want = [a.ids.tolist() for a in written(writer(tiny_lm, how), asked)]
    one, forward = writer(tiny_lm, how), Writer._forward
    calls: list[int] = []

    def full(self: Writer, ids: torch.Tensor, *more: object) -> torch.Tensor:
        calls.append(len(ids))
        if len(ids) > 5 or len(calls) == 40:  # and once more when some answers are there
            raise torch.OutOfMemoryError
        return forward(self, ids, *more)  # type: ignore[arg-type]

    with mock.patch.object(Writer, "_forward", full):
        assert [a.ids.tolist() for a in written(one, asked)] == want
    with (
        mock.patch.object(Writer, "_forward", side_effect=torch.OutOfMemoryError),
        pytest.raises(UsageError, match="one answer of .* tokens does not fit"),
    ):
        written(writer(tiny_lm, how), asked)


def test_logits_that_are_no_numbers_are_refused(tiny_lm: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="NaN or infinite logits for span 4, prompt"):
        written(writer(tmp_path, Sampling(max_new_tokens=4)), prompts())
