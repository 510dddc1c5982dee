"""Training on domains by weight, and figures of each: the rows of an epoch, and who counts them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from launched import launch
from make_caches import CLASSES, make_cache

from kdcache.cache import Cache
from kdcache.cache.figures import teacher_cross_entropy
from kdcache.cache.manifest import Manifest, ShardEntry
from kdcache.cli.main import cli
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.options import EvaluateOptions
from kdcache.commands.run_folder import read_metrics
from kdcache.commands.sweep.grid import Grid
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.domains import Named, Weights
from kdcache.errors import UsageError
from kdcache.options import parse_values
from kdcache.stream import TargetStream
from kdcache.stream.order import rows_by_domain, sources
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE

# Weights


def test_weights_are_numbers_of_caches_or_of_names() -> None:
    both = Weights((2.0, 0.5), {"code": 0.25})
    for values in (["code=0.25", "2", 0.5], (2, Named("code", "0.25"), "0.5"), both, both.shown()):
        assert Weights.parse(values) == both
    assert Weights.parse({"b": 1, "a": 0}) == Weights((), {"a": 0.0, "b": 1.0})
    assert list(Weights.parse({"b": 1, "a": 0}).domains) == ["a", "b"], "order has no effect"
    assert Weights.parse(Weights((), {"a": 1 / 3}).shown()).domains["a"] == 1 / 3, "to the last bit"
    assert [both.of(0, None), both.of(1, "web"), both.of(1, "code")] == [2.0, 0.5, 0.25]
    assert Weights.parse(None).of(7, "any") == 1.0
    with pytest.raises(UsageError) as error:
        Weights.parse(["x", "a=y", "a=-1", "0", "nan", "a=inf", "b=1", "b=2"])
    assert str(error.value).splitlines() == [
        "--cache-weight is 'x', expected a number or NAME=NUMBER.",
        "--cache-weight is 'a=y', expected a number or NAME=NUMBER.",
        "--cache-weight is a=-1, expected 0 or more.",
        "--cache-weight is 0, expected more than 0.",
        "--cache-weight is nan, expected more than 0.",
        "--cache-weight is a=inf, expected 0 or more.",
        "--cache-weight gives b twice. Remove one.",
    ]


@dataclasses.dataclass
class FakeCache:
    """As much of a cache as an order asks for: rows and domain of each shard."""

    shards: list[tuple[int, str | None]]

    @property
    def manifest(self) -> Manifest:
        entries = (
            ShardEntry(i, "", n, n, n, 1, "", domain=domain)
            for i, (n, domain) in enumerate(self.shards)
        )
        return Manifest("", tuple(entries))


def plain_sources(shards: list[int], weight: float) -> list[tuple[int, int]]:
    """Shard and rows of an epoch of one cache without names, as they always were."""
    found = [(i, n) for _ in range(int(weight)) for i, n in enumerate(shards)]
    done = taken = 0
    for i, n in enumerate(shards):
        done += n
        now = math.floor(done * (weight - int(weight)) + 0.5)
        found += [(i, now - taken)] if now > taken else []
        taken = now
    return found


WEIGHT = st.sampled_from([0.01, 0.3, 0.5, 1.0, 1.75, 3.0]) | st.floats(0.001, 4)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), WEIGHT)
def test_caches_without_names_keep_their_order(shards: list[int], weight: float) -> None:
    cache: Any = FakeCache([(n, None) for n in shards])
    found = [(s.shard, s.rows) for s in sources([cache], Weights((weight,)))]
    assert found == plain_sources(shards, weight)
    named: Any = FakeCache([(n, "a") for n in shards])
    assert sources([named], Weights((), {"a": weight})) == sources([cache], Weights((weight,)))


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, "a", "b", "c"])), min_size=1),
        min_size=1,
        max_size=3,
    ),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), WEIGHT | st.just(0.0)),
)
def test_an_epoch_has_a_weights_share_of_each_domain(
    shards: list[list[tuple[int, str | None]]], domains: dict[str, float]
) -> None:
    caches: Any = [FakeCache(mine) for mine in shards]
    weights = Weights((), domains)
    found = sources(caches, weights)
    rows = rows_by_domain(caches, found)
    for index, mine in enumerate(shards):
        for domain in {name for _, name in mine}:
            weight = weights.of(index, domain)
            stored = sum(n for n, name in mine if name == domain)
            share = weight - int(weight)
            assert rows[index, domain] == int(weight) * stored + math.floor(share * stored + 0.5)
            # And of every shard, as evenly as whole rows allow.
            for shard, (n, name) in enumerate(mine):
                if name == domain:
                    used = sum(s.rows for s in found if (s.cache, s.shard) == (index, shard))
                    assert abs(used - weight * n) <= 1
    assert all(s.rows for s in found if s.rows != s.stored)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """A cache of two domains, one of them in two stretches, and one without names."""
    folder = tmp_path_factory.mktemp("mixed")
    first = make_cache(folder / "a", [6, 5, 4], domains=["web", "code", "web"])
    return [first, make_cache(folder / "b", [7], first=100)]


def numbers(stream: TargetStream, epochs: int = 1) -> list[list[int]]:
    """The rows of each batch, by the numbers that they carry."""
    batches = stream.batches(stream.cursor.epoch + epochs)
    return [(b["input_ids"][:, 0] * 64 + b["input_ids"][:, 1]).tolist() for b in batches]


WEB, CODE, PLAIN = [*range(6), *range(11, 15)], [*range(6, 11)], [*range(100, 107)]


def test_rows_come_as_often_as_their_domain_weighs(mixed: list[Cache]) -> None:
    stream = TargetStream(mixed, batch_size=5, weights=["web=1.5", "code=0.4"])
    assert stream.domain_rows == {(0, "web"): 15, (0, "code"): 2, (1, None): 7}
    assert stream.rows == 24
    epochs = [[row for batch in numbers(stream) for row in batch] for _ in range(10)]
    for seen in map(Counter, epochs):
        assert sum(seen[row] for row in WEB) == 15
        assert {seen[row] for row in WEB} == {1, 2}
        assert sum(seen[row] for row in CODE) == 2
        assert all(seen[row] == 1 for row in PLAIN)
    every = Counter(row for seen in epochs for row in seen)
    assert {every[row] for row in CODE} == {4}, "epochs take turns"
    assert {every[row] for row in WEB} == {15}
    # 0 leaves a domain out, and numbers of caches hold where no name does.
    stream = TargetStream(mixed, batch_size=5, weights=["1", "2", "web=0"])
    seen = Counter(row for batch in numbers(stream) for row in batch)
    assert seen == Counter(CODE + 2 * PLAIN)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["cod=2"], r"names the domain 'cod'; the domains are web, code\."),
        ([1.0], "1 cache weights for 2 caches"),
        ([1.0, 0.0], "expected more than 0"),
        ({"web": 0.01}, r"web=0\.01, but of the 10 rows of this domain an epoch would have none"),
        (["web=-1"], "expected 0 or more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    mixed: list[Cache], weights: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        TargetStream(mixed, batch_size=2, weights=weights)
    with pytest.raises(UsageError, match=r"names the domain 'a'; no cache has named domains"):
        TargetStream(mixed[1:], batch_size=2, weights={"a": 1})
    with pytest.raises(UsageError, match="an epoch has 0 rows"):
        TargetStream(mixed[:1], batch_size=2, weights={"web": 0, "code": 0})


# Runs


@pytest.fixture(scope="module")
def corpora(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two JSONL files by the names of their domains."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = {"web": corpus_texts[:30], "code": corpus_texts[60:75]}
    for name, mine in texts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in mine)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {name: str(folder / f"{name}.jsonl") for name in texts}


@pytest.fixture(scope="module")
def built(
    tiny_lm: Path, corpora: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Caches of both domains together, of each alone, and of both without names."""
    folder = tmp_path_factory.mktemp("built")
    sets: dict[str, Any] = {"both": corpora, "plain": tuple(corpora.values())}
    sets |= {name: (path,) for name, path in corpora.items()}
    for name, corpus in sets.items():
        build(
            BuildOptions(
                teacher=(str(tiny_lm),),
                corpus=corpus,
                out=str(folder / name),
                codec="topk:8",
                max_length=32,
                shard_tokens=512,
                workers=0,
            )
        )
    return {name: str(folder / name) for name in sets}


@pytest.fixture
def options(built: dict[str, str], tiny_lm: Path, tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        cache=(built["both"],),
        student=str(tiny_lm / "config.json"),
        out=str(tmp_path / "run"),
        batch_size=16,
        cache_weight=("code=2.5", "web=0.5"),
    )


@pytest.mark.slow
def test_a_run_is_weighted_by_domain_and_says_so(
    options: TrainOptions, built: dict[str, str], tmp_path: Path
) -> None:
    cache = Cache.open(built["both"])
    said: list[str] = []
    result = train(options, report=said.append)
    rows = {d: sum(s.rows for s in cache.manifest.shards if s.domain == d) for d in ("web", "code")}
    wanted = {"web": (rows["web"] + 1) // 2, "code": 2 * rows["code"] + (rows["code"] + 1) // 2}
    assert result.epoch_rows == wanted
    assert result.rows == sum(wanted.values())
    share = 100 * wanted["web"] / result.rows
    mix = f"rows of an epoch: web {wanted['web']:,} ({share:.1f} %), code {wanted['code']:,} ("
    assert any(mix in line for line in said)
    assert f"code {wanted['code']:,}" in Path(options.out, "README.md").read_text()
    # The teacher's cross-entropy counts rows as often as training does.
    nats = counted = 0.0
    for span, shard in enumerate(cache.manifest.shards):
        codes = cache.read(span).label_logprob
        assert codes is not None
        weight = {"web": 0.5, "code": 2.5}[str(shard.domain)]
        nats -= weight * float(decode_logprobs(codes).astype(np.float64).sum())
        counted += weight * len(codes)
    assert result.teacher_cross_entropy == pytest.approx(nats / counted, rel=1e-6)
    again = dataclasses.replace(options, cache_weight=("web=0.5", "code=2.50"))
    assert not train(again).made, "the same weights in another order"
    with pytest.raises(UsageError, match="cache_weight"):
        train(dataclasses.replace(options, cache_weight=("code=2",)))
    with pytest.raises(UsageError, match=r"names the domain 'books'; the domains are web, code\."):
        train(dataclasses.replace(options, out=str(tmp_path / "x"), cache_weight=("books=1",)))


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_two_workers_take_the_steps_of_a_mix_and_evaluate_each_domain(
    options: TrainOptions, built: dict[str, str], tmp_path: Path
) -> None:
    def run(name: str, evaluated: str, **more: Any) -> TrainOptions:
        out, caches = str(tmp_path / name), (built[evaluated],)
        more |= {"eval_batch_size": 7, "eval_steps": 5, "logging_steps": 1}
        return dataclasses.replace(options, out=out, eval_cache=caches, **more)

    def evaluations(of: TrainOptions) -> list[dict[str, float]]:
        lines = (line for line in read_metrics(Path(of.out)) if "eval_loss" in line)
        kept = ("eval_", "step")
        return [
            {k: v for k, v in x.items() if k.startswith(kept) and "time" not in k} for x in lines
        ]

    alone = run("alone", "both", streams=2)
    result = train(alone)
    both = run("two", "both", num_workers=2)
    for end in launch(both, 2):
        assert (end.error, end.exitcode) == (None, 0)
    assert [line["loss"] for line in read_metrics(Path(both.out)) if "loss" in line] == (
        pytest.approx(
            [line["loss"] for line in read_metrics(Path(alone.out)) if "loss" in line], rel=1e-4
        )
    )
    found = evaluations(alone)
    for mine, theirs in zip(evaluations(both), found, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert len(found) >= 2
    # A domain's figures are those of an evaluation on a cache of its own.
    for name in ("web", "code"):
        single = run(name, name, streams=2)
        train(single)
        wanted = [
            {key: line.get(f"{key}/{name}", line[key]) for key in line if "/" not in key}
            for line in found
        ]
        for mine, want in zip(evaluations(single), wanted, strict=True):
            # Stored logprobs are rounded at random by span: the teacher's bits differ a little.
            assert mine == pytest.approx(want, rel=1e-3)
    assert {"eval_hard_loss/web", "eval_soft_loss/web"} <= found[0].keys()
    assert result.eval["loss/web"] != pytest.approx(result.eval["loss/code"], rel=1e-3)
    shown = CliRunner().invoke(
        cli,
        ["train", "--cache", built["both"], "--student", options.student, "--out",
         str(tmp_path / "shown"), "--eval-cache", built["both"], "--max-steps", "1"],
    )  # fmt: skip
    lines = shown.output.partition("Evaluation by domain\n")[2].splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["domain", "web", "code"]


@pytest.mark.slow
def test_files_of_options_and_grids_take_mappings(
    options: TrainOptions, tmp_path: Path, tiny_lm: Path
) -> None:
    found, wrong = parse_values(TrainOptions, {"cache-weight": {"code": 0.5, "web": 2}})
    assert wrong == []
    assert Weights.parse(found["cache_weight"]) == Weights((), {"code": 0.5, "web": 2.0})
    grid = {
        "cache": list(options.cache),
        "student": options.student,
        "grid": {"cache-weight": [{"code": 2}, {"code": 0.5}, ["code=2.0"]]},
    }
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps(grid))
    runs = Grid.read(file).runs
    assert [run.setting["cache_weight"] for run in runs] == ["code=2", "code=0.5"]
    done = CliRunner().invoke(
        cli,
        ["train", "--cache", options.cache[0], "--student", options.student, "--out", options.out,
         "--cache-weight", "nothing=1"],
    )  # fmt: skip
    assert done.exit_code == 2
    assert "--cache-weight names the domain 'nothing'; the domains are web, code." in done.output


# Evaluation


@pytest.mark.slow
def test_each_domain_has_the_figures_of_a_cache_of_its_own(
    built: dict[str, str], tiny_lm: Path, student: Path
) -> None:
    names = (str(student), str(tiny_lm))
    both = evaluate(EvaluateOptions(names, cache=built["both"]))
    plain = evaluate(EvaluateOptions(names, cache=built["plain"]))
    assert plain.domains == ()
    assert [domain.name for domain in both.domains] == ["web", "code"]
    figures = ("kl", "cross_entropy", "accuracy", "agreement", "perplexity", "calibration_error")

    def same(mine: Any, theirs: Any) -> None:
        assert (mine.rows, mine.positions, mine.labelled) == (
            theirs.rows,
            theirs.positions,
            theirs.labelled,
        )
        assert len(mine.models) == 3, "the teacher, and both students"
        for model, other in zip(mine.models, theirs.models, strict=True):
            for figure in figures:
                value, want = getattr(model, figure), getattr(other, figure)
                # A label's rounding is drawn by span and place, so a bit of it differs.
                if want is None:  # of the teacher
                    assert value is None
                    continue
                rough = model.role == "teacher" and figure in ("cross_entropy", "perplexity")
                assert value == pytest.approx(want, rel=0.02 if rough else 1e-4, abs=1e-6), figure

    same(both, plain)
    for domain in both.domains:
        same(domain, evaluate(EvaluateOptions(names, cache=built[domain.name])))
    own = teacher_cross_entropy([Cache.open(built["both"])])
    assert both.models[0].cross_entropy == pytest.approx(own)


@pytest.mark.slow
def test_a_corpus_with_names_is_evaluated_by_domain(
    built: dict[str, str], corpora: dict[str, str], tiny_lm: Path, student: Path
) -> None:
    given_names = tuple(f"{name}={path}" for name, path in corpora.items())
    live = evaluate(
        EvaluateOptions((str(student),), corpus=given_names, teacher=str(tiny_lm), max_length=32)
    )
    cached = evaluate(EvaluateOptions((str(student),), cache=built["both"], teacher=str(tiny_lm)))
    for mine, theirs in zip(live.domains, cached.domains, strict=True):
        assert mine.name == theirs.name
        # The cache has a few spans, whose first tokens have no label.
        for model, other in zip(mine.models, theirs.models, strict=True):
            assert model.cross_entropy == pytest.approx(other.cross_entropy, rel=0.05)
    some = evaluate(EvaluateOptions((str(student),), cache=built["both"], limit=3))
    assert [domain.rows for domain in some.domains] == [3, 3]
    shown = CliRunner().invoke(
        cli, ["evaluate", "--student", str(student), "--cache", built["both"], "--limit", "3"]
    )
    assert shown.exit_code == 0, shown.output
    for title in ("Cross-entropy (nats)", "KL to the teacher (nats, T = 1)", "Accuracy"):
        assert f"{title} by domain" in shown.output
    assert "Soft cross-entropy" not in shown.output


@pytest.mark.slow
def test_a_domain_without_rows_has_no_figures(student_classes: str, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", [9, 0, 8], task=CLASSES, domains=["a", "none", "b"])
    result = evaluate(EvaluateOptions((student_classes,), cache=cache.storage.url))
    assert [(d.name, d.rows) for d in result.domains] == [("a", 9), ("none", 0), ("b", 8)]
    assert all(m.kl is None and m.accuracy is None for m in result.domains[1].models)
    # The confusion matrices of the parts make that of the whole.
    labels = [cache.read(span).labels for span in (0, 2)]
    known = [int((mine != IGNORE).sum()) for mine in labels]
    for index, model in enumerate(result.models):
        parts = [result.domains[0].models[index].accuracy, result.domains[2].models[index].accuracy]
        total = sum(float(p or 0) * n for p, n in zip(parts, known, strict=True)) / sum(known)
        assert model.accuracy == pytest.approx(total)


@pytest.fixture(scope="module")
def student(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import make_tiny_lm

    return make_tiny_lm(tiny_tokenizer, tmp_path_factory.mktemp("student"), seed=5)


@pytest.fixture(scope="module")
def student_classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classes")
    cache = make_cache(folder / "cache", [20], task=CLASSES)
    out = str(folder / "run")
    train(
        TrainOptions(
            cache=(cache.storage.url,), student="bilstm", out=out, embedding_size=4, hidden_size=4
        )
    )
    return out
