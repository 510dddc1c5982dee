"""A language model writes answers in vLLM, which batches them as they come and go.

Each answer is a request of its own, with a seed of (seed, span, prompt, sample). All requests of a
span are in the engine at once, and those of both spans of a worker, so it is never short of work.

Guarantee: vLLM draws by the request's seed; its logits, and so now and then a token, move with the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.rows.spec import Answer, Sampling
from kdcache.teacher.drawing import noise
from kdcache.teacher.engine.process import Engine
from kdcache.teacher.files import TeacherFiles
from kdcache.teacher.options import TeacherOptions

_WAIT = 1.0  # seconds between two looks at whether the worker is stopped


class EngineWriter:
    """A model that vLLM runs, which writes."""

    takes_turns = False

    def __init__(
        self,
        options: TeacherOptions,
        how: Sampling,
        *,
        vocab_size: int,
        ends: Sequence[int],
        tokenizer: Any,
    ) -> None:
        """Start the engine; see `Writer` for the arguments."""
        assert options.engine is not None, "an engine was asked for"
        (name,) = options.names
        files = TeacherFiles.find(name, trust_remote_code=options.trust_remote_code, role="model")
        for sha256 in options.identities:
            files.check_same(sha256)
        self.device = torch.device("cpu" if options.device == "cpu" else "cuda")
        self._engine = Engine(
            files.folder,
            options.engine,
            dtype=options.dtype,
            gpu=self.device.type == "cuda",
            trust_remote_code=options.trust_remote_code,
            writes=True,
        )
        self._how = how
        self._asked = {
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k,
            "min_p": how.min_p,
            "max_tokens": how.max_new_tokens,
            "stop": list(how.stop),
            "stop_token_ids": list(ends),
            "logprobs": 0,  # of the token that is drawn
            "detokenize": bool(how.stop),
        }
        if vocab_size < int(
            files.config.get_text_config().vocab_size
        ):  # ids that pad the output layer are never drawn
            self._asked["allowed_token_ids"] = list(range(vocab_size))

    def close(self) -> None:
        """See `Writes.close`."""
        self._engine.close()

    def write(
        self, span: int, prompts: Sequence[npt.NDArray[np.int32]], done: Callable[[int], None]
    ) -> list[Answer]:
        """See `Writes.write`."""
        asked = [
            self._engine.continue_(prompt.tolist(), **self._asked, seed=self._seed(span, i, k))
            for i, prompt in enumerate(prompts)
            for k in range(self._how.samples)
        ]
        left: set[Future[Any]] = set(asked)
        try:
            while left:
                ended, left = wait(left, _WAIT, FIRST_COMPLETED)
                for one in ended:
                    done(len(one.result().token_ids))
                done(0)
            return [_answer(one.result()) for one in asked]
        finally:
            for one in left:
                one.cancel()

    def _seed(self, span: int, prompt: int, sample: int) -> int:
        return int(noise(self._how.seed, span, prompt, sample, 0) * 2.0**53)


def _answer(found: Any) -> Answer:
    ids = np.array(found.token_ids, np.int32)
    logprobs = [each[int(i)].logprob for i, each in zip(ids, found.logprobs, strict=True)]
    stopped = found.finish_reason == "stop"
    return Answer(ids, np.array(logprobs, np.float32), "stop" if stopped else "length")
