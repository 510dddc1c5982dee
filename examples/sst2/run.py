"""BERT into a biLSTM on SST-2, as Tang et al. 2019 (arXiv:1903.12136) did: pretrained word vectors,
a transfer set that only the teacher labels, squared error on the logits, several seeds.

    python examples/sst2/run.py --data SST2 --teacher TEACHER --vectors glove.6B.100d.txt \\
        --tagger en_core_web_sm --out work

Every student is trained from the same caches with the same sizes, and the epoch with the best dev
accuracy is tested. What is finished is kept in the work folder: the same command continues. At the
end `work/table.md` and `work/accuracy.png` have the test accuracies. README.md says what is
expected where, and what came out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import random
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transfer import PAPER, PHRASES, Rules, part_of_speech, transfer_set

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HARD: dict[str, Any] = {"alpha": 1.0}
SOFT: dict[str, Any] = {"alpha": 0.0, "divergence": "mse"}
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Student:
    """One row of the table.

    Attributes:
        name: of the row.
        loss: fields of `TrainOptions`.
        vectors: whether it begins with pretrained word vectors.
        sets: the transfer sets that it also learns from.
    """

    name: str
    loss: dict[str, Any]
    vectors: bool = True
    sets: tuple[str, ...] = ()


STUDENTS = (
    Student("hard labels, no vectors", HARD, vectors=False),
    Student("hard labels", HARD),
    Student("logits of the sentences", SOFT),
    Student("+ transfer set of the paper", SOFT, sets=("paper",)),
    Student("+ phrases", SOFT, sets=("phrases",)),
    Student("+ both", SOFT, sets=("paper", "phrases")),
    Student("+ phrases, no vectors", SOFT, vectors=False, sets=("phrases",)),
)
BASELINE = "hard labels"
RESULT = "sst2.json"  # in the folder of each run


def rows_of(path: Path) -> list[tuple[str, str]]:
    """Texts and labels of a file: `text TAB label`, GLUE's header being optional."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file. README.md says what --data must hold.")
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines and lines[0] == "sentence\tlabel":
        del lines[0]
    rows = [tuple(line.rsplit("\t", 1)) for line in lines]
    wrong = next(
        (i for i, row in enumerate(rows) if len(row) != 2 or row[1] not in ("0", "1")), None
    )
    if not rows:
        raise SystemExit(f"{path} has no rows.")
    if wrong is not None:
        raise SystemExit(f"{path}: expected lines `text TAB 0 or 1`; row {wrong} is not one.")
    return [(text.strip(), label) for text, label in rows]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    """A TSV with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")
    return path


def make_files(options: argparse.Namespace, out: Path) -> dict[str, Path]:
    """The three splits and the transfer sets, as files of `text` and `label`."""
    folder = Path(options.data)
    splits = {name: rows_of(folder / f"{name}.tsv") for name in SPLITS if name != "test"}
    if options.glue:  # its test labels are secret: dev is the test, a part of train the dev
        splits["test"] = splits["dev"]
        random.Random(0).shuffle(splits["train"])
        count = len(splits["test"])
        splits["dev"], splits["train"] = splits["train"][:count], splits["train"][count:]
    else:
        splits["test"] = rows_of(folder / "test.tsv")
    files = {name: write(out / "data" / f"{name}.tsv", rows) for name, rows in splits.items()}
    sentences = [text.split() for text, _ in splits["train"]]
    tags = part_of_speech(sentences, options.tagger) if options.tagger else None
    for name, rules in (("paper", PAPER), ("phrases", PHRASES)):
        own = Rules(**{**asdict(rules), "variants": options.variants})
        texts = transfer_set(sentences, tags, own)
        files[name] = write(out / "data" / f"{name}.tsv", [(text, "") for text in texts])
        print(f"{name}: {len(texts)} new texts", flush=True)
    return files


def make_caches(options: argparse.Namespace, out: Path, files: dict[str, Path]) -> None:
    """The teacher's logits for each row of each file, once."""
    from kdcache import BuildOptions, FinetuneOptions, build, finetune

    teacher = options.teacher
    if teacher is None:
        teacher = str(out / "teacher")
        finetune(
            FinetuneOptions(
                model=options.model,
                corpus=(str(files["train"]),),
                eval_corpus=(str(files["dev"]),),
                out=teacher,
                batch_size=32,
            )
        )
    for name, file in files.items():
        result = build(
            BuildOptions(
                teacher=(teacher,),
                corpus=(str(file),),
                out=str(out / "caches" / name),
                task="sequence-classification",
                max_length=64,
                workers=0,
            )
        )
        print(f"{name}: {result.rows} rows, teacher {result.teacher_seconds:.0f} s", flush=True)


def run(out: Path, student: Student, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train and test one student."""
    import torch

    from kdcache import EvaluateOptions, TrainOptions, evaluate, train

    torch.set_num_threads(1)
    folder = out / "runs" / f"{re.sub(r'[^a-z]+', '-', student.name).strip('-')}-{seed}"
    epochs = settings["epochs"] if student.sets else settings["sentence_epochs"]
    result = train(
        TrainOptions(
            cache=tuple(str(out / "caches" / name) for name in ("train", *student.sets)),
            eval_cache=(str(out / "caches/dev"),),
            out=str(folder),
            student="bilstm",
            embeddings=settings["vectors"] if student.vectors else None,
            bilstm=(
                f"embedding-size={settings['size']}",
                f"hidden-size={settings['hidden']}",
                "dropout=0.3",
            ),
            epochs=epochs,
            batch_size=64,
            eval_batch_size=256,
            best="accuracy",
            patience=settings["patience"],
            report_to=(),
            seed=seed,
            **student.loss,
        )
    )
    scores = evaluate(EvaluateOptions(student=(str(folder),), cache=str(out / "caches/test")))
    teacher, own = scores.models
    row = {
        "name": student.name,
        "seed": seed,
        "accuracy": own.accuracy,
        "agreement": own.agreement,
        "teacher": teacher.accuracy,
        "dev": result.eval["accuracy"],
        "rows": result.rows,
        "seconds": result.seconds,
    }
    (folder / RESULT).write_text(json.dumps(row) + "\n")
    return row


def each(
    out: Path, work: list[tuple[Student, int]], settings: dict[str, Any], jobs: int
) -> Iterator[dict[str, Any]]:
    """`run` of each student and seed, here or in several processes."""
    if jobs == 1:
        yield from (run(out, student, seed, settings) for student, seed in work)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        running = [pool.submit(run, out, student, seed, settings) for student, seed in work]
        yield from (done.result() for done in concurrent.futures.as_completed(running))


def table(results: list[dict[str, Any]]) -> str:
    """Mean, standard deviation, range and gain of each student, in Markdown.

    The gain is over hard labels with vectors, seed by seed, with the standard error of its mean;
    "of the gap" its share of the teacher's over the same seeds.
    """
    teacher = 100 * results[0]["teacher"]
    accuracy = {(r["name"], r["seed"]): 100 * r["accuracy"] for r in results}
    base = {seed: value for (name, seed), value in accuracy.items() if name == BASELINE}
    lines = [
        "| student | seeds | rows | test accuracy, % | std | range | gain | of the gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(student.name for student in STUDENTS):
        own = {seed: value for (n, seed), value in accuracy.items() if n == name}
        if not own:
            continue
        values = list(own.values())
        spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""
        pairs = [(value, base[seed]) for seed, value in own.items() if seed in base]
        gain = share = ""
        if pairs and name != BASELINE:
            gains = [value - plain for value, plain in pairs]
            mean = statistics.fmean(gains)
            share = f"{mean / statistics.fmean(teacher - plain for _, plain in pairs):.0%}"
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
            gain = f"{mean:+.1f}" + ("" if error is None else f" ± {error:.1f}")
        rows = max(r["rows"] for r in results if r["name"] == name)
        lines.append(
            f"| {name} | {len(own)} | {rows:,} | {statistics.fmean(values):.1f} | {spread} "
            f"| {min(values):.1f} - {max(values):.1f} | {gain} | {share} |"
        )
    over = f"{teacher - statistics.fmean(base.values()):+.1f}" if base else ""
    lines.append(f"| teacher | | | {teacher:.1f} | | | {over} | |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A dot for each run, a line at each student's mean, the teacher dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [s.name for s in STUDENTS if any(r["name"] == s.name for r in results)]
    for place, name in enumerate(reversed(names)):
        values = [100 * r["accuracy"] for r in results if r["name"] == name]
        mean = statistics.fmean(values)
        axes.plot(values, [place] * len(values), "o", color="#0072b2", alpha=0.5)
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color="#222222")
        axes.annotate(f"{mean:.1f}", (mean, place + 0.32), ha="center", fontsize=8)
    teacher = 100 * results[0]["teacher"]
    axes.axvline(teacher, color="#d55e00", linestyle="--")
    axes.annotate(f"teacher {teacher:.1f} ", (teacher, -0.5), ha="right", color="#d55e00")
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_ylim(-0.7, len(names) - 0.2)
    axes.set_xlabel("SST-2 test accuracy, %: a dot a seed, a line at the mean")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def show(out: Path) -> None:
    """Write table and plot of all runs that are finished."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob(f"runs/*/{RESULT}"))]
    (out / "table.md").write_text(table(results) + "\n")
    plot(results, out / "accuracy.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with train.tsv, dev.tsv, test.tsv")
    parser.add_argument("--glue", action="store_true", help="test on dev.tsv, as GLUE's files are")
    parser.add_argument("--teacher", help="folder of a classifier that is fine-tuned already")
    parser.add_argument("--model", help="else: an encoder to fine-tune, such as bert-base-uncased")
    parser.add_argument("--vectors", required=True, help="GloVe or word2vec text file")
    parser.add_argument("--size", type=int, default=100, help="numbers a word in it")
    parser.add_argument("--hidden", type=int, default=150, help="width of the LSTM, each way")
    parser.add_argument("--tagger", help="spaCy pipeline; without one no word is replaced")
    parser.add_argument("--out", required=True, help="work folder, kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", type=int, default=20, help="tries a sentence, in each set")
    parser.add_argument("--epochs", type=int, default=10, help="with a transfer set")
    parser.add_argument("--sentence-epochs", type=int, default=10, help="without one")
    parser.add_argument("--patience", type=int, default=3, help="epochs without a better one")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--only", default="", help="train students whose name contains this")
    options = parser.parse_args(arguments)
    if (options.teacher is None) == (options.model is None):
        parser.error("name a --teacher, or a --model to be fine-tuned")
    out = Path(options.out)
    make_caches(options, out, make_files(options, out))
    settings = {
        "vectors": options.vectors,
        "size": options.size,
        "hidden": options.hidden,
        "epochs": options.epochs,
        "sentence_epochs": options.sentence_epochs,
        "patience": options.patience,
    }
    # Seed by seed: what is stopped early has seen all students equally often.
    work = [(s, seed) for seed in range(options.seeds) for s in STUDENTS if options.only in s.name]
    for row in each(out, work, settings, options.jobs):
        print(json.dumps(row), flush=True)
        show(out)
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
