"""Targets of sources: texts in, what a sequence-to-sequence model writes out, a JSON line a record.

A line has a `source` and a `target`, so the output of a teacher is a corpus of its own: of targets
that the teacher would write itself (sequence-level distillation, Kim and Rush 2016).

Cost: the model's own `generate`, on batches of sources of about one length.
Guarantee: a target is what `generate` writes of its source alone, up to rounding: the model is
probed first, and one whose logits move with the padding of a batch is given sources of one length,
or one by one. The search is that of the options, greedy or of beams, and never samples; what else
the model's `generation_config.json` states of the tokens of a target holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from kdcache.errors import UsageError, reason_of
from kdcache.humanize import printable
from kdcache.rows.batches import batches, pad_rows
from kdcache.rows.pairs import pair_row, set_languages, target_ids
from kdcache.rows.spec import LAST_LABEL, Row
from kdcache.rows.tokens import frame, tokens_of
from kdcache.student.saved import SavedModel
from kdcache.teacher.load import load_models
from kdcache.teacher.model import TeacherModel

# Of a model's `generation_config.json`: what would give several targets a source or none as ids,
# need code or a tokenizer that `generate` does not have here, or end a target by the clock.
_SEARCH = (
    *("num_return_sequences", "return_dict_in_generate", "num_beam_groups", "diversity_penalty"),
    *("penalty_alpha", "force_words_ids", "constraints", "dola_layers", "low_memory"),
    *("assistant_early_exit", "prompt_lookup_num_tokens", "guidance_scale", "token_healing"),
    *("cache_implementation", "cache_config", "max_time", "use_cache"),
)


@dataclass(frozen=True)
class WrittenTarget:
    """What a model writes for a source.

    Attributes:
        source: unchanged from the input.
        target: the text, without special tokens; empty of an empty source.
        finished: whether the model ended it.
    """

    source: str
    target: str
    finished: bool = True

    def to_json(self) -> str:
        """One line."""
        values = {"source": self.source, "target": self.target}
        return printable(json.dumps(values, ensure_ascii=False))


class Writer:
    """A loaded sequence-to-sequence model that writes targets."""

    def __init__(
        self,
        saved: SavedModel,
        *,
        task: str,
        dtype: str,
        device: str,
        max_length: int,
        max_source_length: int | None,
        beams: int = 1,
        source_lang: str | None = None,
        target_lang: str | None = None,
    ) -> None:
        """Load the model.

        Args:
            saved: the model.
            task: what to load it for.
            dtype: `float32`, `bfloat16` or `float16`.
            device: `cpu` or a CUDA device.
            max_length: most tokens of a target.
            max_source_length: of a source; None for what the model reads.
            beams: of the search; 1 is greedy.
            source_lang: for tokenizers that mark languages.
            target_lang: likewise.

        Raises:
            UsageError: it is of another task, has no tokenizer, or knows no such language.
        """
        saved.check_task(task)
        if saved.is_factory or saved.tokenizer is None:
            raise UsageError(
                f"{saved.who} has no tokenizer, or no way to write texts. Copy its "
                "tokenizer's files into its folder, or name a model of transformers."
            )
        self.saved, self.tokenizer, self.task = saved, saved.tokenizer, task
        set_languages(self.tokenizer, source_lang, target_lang)
        loading = saved.loading(task, dtype=dtype, device=device)
        (self.model,) = load_models(loading)
        says = self.model.generation_config
        plain = type(says)()
        for setting in filter(says.to_dict().__contains__, _SEARCH):
            setattr(says, setting, getattr(plain, setting, None))
        self._probe = TeacherModel(self.model, saved.who, loading, saved.vocab_size(task))
        self._probed = False
        bounds = [max_source_length, saved.files.source_reach]
        self._source_length = min([1 << 20, *(bound for bound in bounds if bound is not None)])
        reach = saved.files.reach(task)
        self._how: dict[str, Any] = {
            "max_new_tokens": max_length if reach is None else min(max_length, reach - 1),
            "num_beams": beams,
            "do_sample": False,
            **self._first(target_lang),
        }
        self.cut = 0

    def _first(self, language: str | None) -> dict[str, int]:
        """How a target begins, where the language decides it."""
        start = self._probe.start
        if start == LAST_LABEL:
            return {"decoder_start_token_id": int(target_ids(self.tokenizer, ["a"])[0][-1])}
        found = {"decoder_start_token_id": int(start or 0)}
        before, _ = frame(self.tokenizer, target=True)
        return {**found, "forced_bos_token_id": before[0]} if language and before else found

    def write(self, sources: Sequence[str], *, batch_tokens: int = 4096) -> list[WrittenTarget]:
        """Targets of sources, in their order.

        Args:
            sources: texts.
            batch_tokens: tokens of a batch, sources and the longest targets.
        """
        filled = [i for i, text in enumerate(sources) if text.strip()]
        found = [WrittenTarget(text, "") for text in sources]
        if not filled:
            return found
        rows = self._rows([sources[i] for i in filled])
        if not self._probed:
            self._probe.probe(rows[:64])
            self._probed = True
        longest = int(self._how["max_new_tokens"]) * int(self._how["num_beams"])
        for chosen in batches([(len(_source(row)), longest) for row in rows], batch_tokens):
            for some in self._batches(chosen, rows):
                for i, (text, finished) in zip(
                    some, self._run([rows[j] for j in some]), strict=True
                ):
                    found[filled[i]] = WrittenTarget(sources[filled[i]], text, finished)
        return found

    def _rows(self, texts: Sequence[str]) -> list[Row]:
        encoded = tokens_of(
            self.tokenizer,
            texts,
            add_special_tokens=True,
            truncation=True,
            max_length=self._source_length,
        )
        rows = []
        for ids, _, cut in encoded:
            self.cut += cut
            # Labels for the probe alone, of which any will do.
            labels = np.array(ids[:8], np.int32)
            rows.append(pair_row(ids, labels, self._probe.start or 0, 8))
        return rows

    def _batches(self, chosen: Sequence[int], rows: Sequence[Row]) -> Iterator[list[int]]:
        """Which rows of a batch are run at once."""
        classify = self._probe.length_class
        if self._probe.batching == "padded":
            for _, alike in groupby(
                chosen, lambda i: None if classify is None else classify(len(_source(rows[i])))
            ):
                yield list(alike)
        elif self._probe.batching == "equal lengths":
            for _, alike in groupby(chosen, lambda i: len(_source(rows[i]))):
                yield list(alike)
        else:
            yield from ([i] for i in chosen)

    @torch.inference_mode()
    def _run(self, rows: Sequence[Row]) -> Iterator[tuple[str, bool]]:
        batch = pad_rows(rows, self._probe.pad_id)
        given = {
            name: self._probe.to_device(torch.from_numpy(batch[name]))
            for name in ("input_ids", "attention_mask")
        }
        try:
            written = self.model.generate(**given, **self._how, tokenizer=self.tokenizer)
        except ValueError as error:
            raise UsageError(
                f"{self.saved.who} cannot write targets as its "
                f"generation_config.json says: {reason_of(error)}."
            ) from error
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for ids in written.tolist():
            text = self.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            yield str(text).strip(), bool(ends & set(ids[1:]))


def _source(row: Row) -> np.ndarray:
    assert row.source is not None, "it was made with one"
    return row.source
