"""Which text should a student learn from? A corpus, its teacher's text, or what it writes itself.

    python examples/rounds/run.py --teacher TEACHER --corpus passages.jsonl --out work

All students begin as one that was trained on the corpus, and take the same number of steps on rows
of the same length, with the same prompts: the first tokens of the corpus's passages. Text that the
student writes is new in every round, scored by the teacher. What is finished is kept in the work
folder: the same command continues. At the end `work/table.md` has means and deviations over the
seeds; README.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import kdcache
from kdcache.cache import Cache

PROMPT, NEW, BATCH = 16, 64, 32  # tokens of a prompt and of an answer; rows of a step
DIVERGENCES = ("forward-kl", "reverse-kl", "jsd", "policy-gradient")
FIGURES = ("teacher's text", "own text", "own text, reverse")


class Rounds:
    """The trainings of one seed."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.home = Path(options.out) / f"seed-{seed}"

    def passages(self, name: str) -> str:
        """A file of passages: `train`, or `held-out`, which nothing is trained on."""
        path = self.home.parent / f"{name}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = Path(self.options.corpus).read_text().splitlines()
            held = self.options.held_out
            chosen = lines[:held] if name == "held-out" else lines[held : held + self.options.rows]
            path.write_text("\n".join(chosen) + "\n")
        return str(path)

    def build(self, corpus: str, name: str, **more: Any) -> str:
        """The teacher's targets of some text."""
        out = str(self.home / name / "cache")
        kdcache.build(
            kdcache.BuildOptions(
                teacher=(self.options.teacher,),
                corpus=(corpus,),
                out=out,
                codec="dense",
                max_length=PROMPT + NEW,
                workers=0,
                **more,
            )
        )
        return out

    def write(self, model: str, name: str, prompts: str, seed: int) -> tuple[str, float]:
        """Text of a model, and minus its log-probability of a token."""
        out = str(self.home / name / "text")
        result = kdcache.generate(
            kdcache.GenerateOptions(
                model=model,
                corpus=(prompts,),
                out=out,
                prompt_tokens=PROMPT,
                max_new_tokens=NEW,
                max_length=PROMPT + NEW,
                seed=seed,
                workers=0,
            )
        )
        return out, result.nats

    def train(
        self, cache: str, name: str, steps: int, *, start: str | None, divergence: str
    ) -> str:
        """A student."""
        out = str(self.home / name / "run")
        kdcache.train(
            kdcache.TrainOptions(
                cache=(cache,),
                student=self.options.student,
                out=out,
                init_from=start,
                divergence=divergence,  # type: ignore[arg-type]
                alpha=0.0,
                max_steps=steps,
                batch_size=BATCH,
                learning_rate=self.options.learning_rate,
                seed=self.seed,
            )
        )
        return out

    def begun(self) -> str:
        """The student that all begin as."""
        cache = self.build(self.passages("train"), "corpus", packing="none")
        return self.train(cache, "begun", self.options.steps, start=None, divergence="forward-kl")

    def student(self, text: str, divergence: str) -> str:
        """A student of one kind of text; "own" text is written anew in every round."""
        start, prompts = self.begun(), self.passages("train")
        rounds, steps, name = self.options.rounds, self.options.steps, f"{text}-{divergence}"
        if text == "own":
            for number in range(rounds):
                here = f"{name}/{number}"
                fresh, _ = self.write(start, here, prompts, 1000 * self.seed + number)
                cache = self.build(fresh, here)
                start = self.train(cache, here, steps, start=start, divergence=divergence)
            return start
        if text == "corpus":
            cache = self.build(prompts, "corpus", packing="none")
        else:
            fresh, _ = self.write(self.options.teacher, "teachers", prompts, 1000 * self.seed)
            cache = self.build(fresh, "teachers")
        return self.train(cache, name, rounds * steps, start=start, divergence=divergence)

    def figures(self, name: str, student: str) -> dict[str, float]:
        """KL of teacher and student on held-out text of both, nats a token."""
        path = self.home / name / "figures.json"
        if path.exists():
            return dict(json.loads(path.read_text()))
        held, seed = self.passages("held-out"), 77
        theirs, _ = self.write(self.options.teacher, "held-out", held, seed)
        own, nats = self.write(student, f"{name}/held-out", held, seed)
        caches = self.build(theirs, "held-out"), self.build(own, f"{name}/held-out")
        kls = []
        for cache in caches:
            scored = kdcache.evaluate(kdcache.EvaluateOptions(student=(student,), cache=cache))
            (mine,) = [one for one in scored.models if one.role == "student"]
            kls.append(float(mine.kl or 0.0))
        # Over what the student drew itself, the mean of log q - log p is KL(student || teacher).
        shards = Cache.open(caches[1]).manifest.shards
        surprise = sum(shard.label_nats or 0.0 for shard in shards)
        reverse = surprise / sum(shard.positions for shard in shards) - nats
        found = dict(zip(FIGURES, (*kls, reverse), strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        return found


def table(options: argparse.Namespace) -> str:
    """Mean and standard deviation over the seeds, of each kind of text and divergence."""
    lines = ["| text | divergence | " + " | ".join(FIGURES) + " |", "|---|---|" + "---|" * 3]
    rows = [("corpus", "forward-kl", "begun")]
    rows += [
        (text, divergence, f"{text}-{divergence}")
        for text in ("corpus", "teacher", "own")
        for divergence in options.divergence
        if text == "own" or divergence != "policy-gradient"  # which is of what a student wrote
    ]
    for text, divergence, name in rows:
        found = []
        for seed in range(options.seeds):
            one = Rounds(options, seed)
            student = one.begun() if name == "begun" else one.student(text, divergence)
            found.append(one.figures(name, student))
        cells = []
        for figure in FIGURES:
            values = [each[figure] for each in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        first = "the beginning" if name == "begun" else text
        lines.append(f"| {first} | {divergence} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder or hub id of a language model")
    parser.add_argument("--corpus", required=True, help="JSONL file with a text a line")
    parser.add_argument("--student", required=True, help="configuration of the student")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1920, help="passages of a round")
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--steps", type=int, default=240, help="of a round")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--divergence", nargs="+", default=list(DIVERGENCES), choices=DIVERGENCES)
    options = parser.parse_args(words)
    found = table(options)
    Path(options.out, "table.md").write_text(found)
    print(found)


if __name__ == "__main__":
    main()
