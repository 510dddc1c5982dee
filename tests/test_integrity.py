"""Whole caches and broken ones: every bit counts, and what is broken is made anew."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_caches import GOLDEN, files, flip, forge, golden_copy, naming, run
from conftest import further, make_tiny_lm
from make_caches import CAUSAL, make_cache

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.cache.sealing import prepare_manifest, seal
from kdcache.cache.shard import ShardData
from kdcache.cache.spec import from_text, to_text
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import GcOptions, RepairOptions
from kdcache.commands.upkeep import gc, repair
from kdcache.commands.verify import Recheck, recheck
from kdcache.errors import CorruptCacheError, IncompleteError, KdcacheError, UsageError
from kdcache.models import HeadedConfig
from kdcache.stream import TargetStream
from kdcache.targets import SoftTargets
from kdcache.teacher.headed import HeadedForSequenceClassification


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return golden_copy(tmp_path / "golden")


# Every bit


@pytest.mark.parametrize("name", ["spec.json", "manifest.json"])
def test_no_bit_of_a_document_can_flip_unseen(name: str) -> None:
    whole = (GOLDEN / "sample-1-2" / name).read_bytes()
    assert to_text(from_text(whole, name)) == whole
    data = bytearray(whole)
    for bit in range(8 * len(whole)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptCacheError, match=name):
            from_text(bytes(data), name)
        data[bit // 8] ^= 1 << bit % 8
    for length in range(len(whole)):
        with pytest.raises(CorruptCacheError):
            from_text(whole[:length], name)


@pytest.mark.slow
def test_no_file_of_a_cache_can_have_a_flipped_bit(golden: Path) -> None:
    whole = files(golden)
    assert len(whole) == 6
    rng = np.random.default_rng(0)
    for name, data in whole.items():
        ends = (0, 8 * len(data) - 1)
        for i, bit in enumerate([*rng.integers(8 * len(data), size=3).tolist(), *ends]):
            flip(golden / name, bit)
            if i == 0:
                assert Path(name).name in naming(golden), f"bit {bit} of {name} flips unseen"
            with pytest.raises(CorruptCacheError, match=re.escape(Path(name).name)):
                use(golden)
            (golden / name).write_bytes(data)
    assert naming(golden) == ""
    use(golden)


def use(folder: Path) -> None:
    """As training does: open, read the tokenizer, then all rows."""
    cache = Cache.open(str(folder))
    cache.tokenizer()
    list(TargetStream(cache, batch_size=4))


def test_verify_names_each_file_on_a_line_and_train_refuses(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", [4, 4, 4], temperatures=(1.0,))
    good = run("verify", str(tmp_path / "cache"))
    assert good.exit_code == 0
    assert [line[:19] for line in good.stderr.splitlines()] == ["Next: kdcache train"]
    assert "3 shards, 12 rows: all good" in good.stdout
    shards = sorted((tmp_path / "cache" / "shards").iterdir())
    flip(shards[0], 8 * 4000)  # in no column
    shards[1].unlink()
    (tmp_path / "cache" / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    shutil.copy(shards[2], tmp_path / "cache" / "shards" / "00002-0123456789abcdef.h5")
    bad = run("verify", str(tmp_path / "cache"))
    assert bad.exit_code == 1
    *lines, then = bad.stderr.splitlines()
    assert then == f"Next: kdcache repair {tmp_path / 'cache'}"
    wanted = ("notes.txt", "00002-0123456789abcdef.h5", "tokenizer.json", *(s.name for s in shards))
    for line, name in zip(lines, wanted[:-1], strict=True):
        assert name in line
    words = ["--student", "bilstm", "--temperature", "1", "--out", str(tmp_path / "run")]
    trained = run("train", "--cache", str(tmp_path / "cache"), *words)
    assert trained.exit_code == 1
    assert "sha256 is" in trained.stderr


def test_values_that_no_teacher_gives_are_a_problem_though_every_hash_is_right(
    tmp_path: Path,
) -> None:
    cache = make_cache(tmp_path / "a", [6], task=CAUSAL, codec="topk:3", temperatures=(1.0,))

    def wrong(name: str, value: float) -> str:
        def change(data: ShardData) -> ShardData:
            columns = {k: v.copy() for k, v in data.targets.columns.items()}
            columns[name].reshape(-1)[3] = value
            return dataclasses.replace(data, targets=SoftTargets(cache.codec(), columns))

        folder = tmp_path / f"{name}-{value}"
        (found,) = problems(forge(cache, folder, change))
        assert found.file.startswith("shards/00000-")
        assert found.file[7:] in found.text
        return found.text

    assert "outside the vocabulary of 64" in wrong("ids", 64)
    assert "a weight" in wrong("tail", float("nan"))
    assert "a weight" in wrong("tail", 1.5)

    dense = make_cache(tmp_path / "b", [6])

    def label(data: ShardData) -> ShardData:
        return dataclasses.replace(data, labels=np.full_like(data.labels, 3))

    (found,) = problems(forge(dense, tmp_path / "label", label))
    assert "label 3, expected less than 3" in found.text


# Against the teacher


@pytest.fixture(scope="module")
def built(
    tiny_lm: Path, text_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuildOptions:
    """A finished build, which tests have copies of."""
    made = BuildOptions(
        teacher=(str(tiny_lm),), corpus=(str(text_corpus),),
        out=str(tmp_path_factory.mktemp("built") / "cache"), workers=0, codec="topk:8",
        max_length=32, shard_tokens=800, limit=60,
    )  # fmt: skip
    build(made)
    return made


@pytest.fixture
def options(built: BuildOptions, tmp_path: Path) -> BuildOptions:
    """The same, in a folder where nothing is yet."""
    return dataclasses.replace(built, out=str(tmp_path / "cache"))


@pytest.fixture
def copied(built: BuildOptions, tmp_path: Path) -> BuildOptions:
    out = shutil.copytree(built.out, tmp_path / "copied")
    return dataclasses.replace(built, out=str(out))


def other_lm(tiny_tokenizer: Path, folder: Path) -> str:
    return str(make_tiny_lm(tiny_tokenizer, folder, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "dtype"),
    [("dense", "float32"), ("sample:8", "bfloat16"), *further(("topk:8", "bfloat16"))],
)
def test_the_right_teacher_passes_and_another_fails(
    codec: str, dtype: Any, options: BuildOptions, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    change = {"codec": codec, "dtype": dtype, "limit": 40, "temperatures": (1.0, 2.0)}
    options = dataclasses.replace(options, **change)
    build(options)
    cache = Cache.open(options.out)
    found = recheck(cache, options.teacher)
    assert found.problems == ()
    assert found.same_teacher
    assert found.rows == 32
    assert found.cached <= found.allowed
    assert found == recheck(cache, options.teacher)
    wrong = recheck(cache, [other_lm(tiny_tokenizer, tmp_path / "other")])
    (problem,) = wrong.problems
    assert "not those of this teacher" in problem
    assert not wrong.same_teacher
    assert wrong.cached > 2 * wrong.allowed


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["sample:8", *further("dense", "topk:8", "anchored:8")])
def test_targets_of_a_coarser_dtype_and_of_another_row_are_found(
    codec: str, options: BuildOptions, tmp_path: Path
) -> None:
    options = dataclasses.replace(options, codec=codec, limit=40)
    out = str(tmp_path / "coarse")
    build(dataclasses.replace(options, dtype="bfloat16", out=out))
    forged = forge(Cache.open(out), tmp_path / "wide", lambda data: data, dtype="float32")
    (problem,) = recheck(forged, options.teacher).problems
    assert "so the cache is wrong" in problem

    build(options)
    cache = Cache.open(options.out)

    def moved(count: int | None) -> Any:
        """The targets of the first positions moved to another row."""

        def move(data: ShardData) -> ShardData:
            every = np.arange(len(data.targets))
            every[:count] = np.roll(every[:count], 32)
            return dataclasses.replace(data, targets=data.targets.take(every))

        return move

    (problem,) = recheck(forge(cache, tmp_path / "all", moved(None)), options.teacher).problems
    assert "not those of this teacher" in problem
    one, rows = forge(cache, tmp_path / "one", moved(64)), cache.manifest.rows
    (problem,) = recheck(one, options.teacher, sample=rows).problems
    assert "not those of" in problem


@pytest.mark.slow
def test_classifiers_and_ensembles_are_run_again(
    tiny_classifier: Path, labelled_corpus: Path, options: BuildOptions, tmp_path: Path
) -> None:
    other = other_classifier(tiny_classifier, tmp_path / "other")
    both = (str(tiny_classifier), other)
    change = {"task": "sequence-classification", "corpus": (str(labelled_corpus),), "codec": None}
    options = dataclasses.replace(
        options, **change, limit=60, teacher=both, teacher_weight=(3.0, 1.0)
    )
    build(options)
    cache = Cache.open(options.out)
    assert recheck(cache, both).problems == ()
    assert recheck(cache, both, sample=7, seed=3).rows == 7
    assert recheck(cache, both[::-1]).problems != ()
    with pytest.raises(UsageError, match="built with 2 teachers, 1 are named"):
        recheck(cache, both[:1])
    result = run("verify", options.out, "--teacher", both[0], "--teacher", both[1])
    assert result.exit_code == 0
    assert "32 rows, 32 positions run again" in result.stdout
    result = run("verify", options.out, "--teacher", both[1], "--teacher", both[0], "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["problems"] == found["recheck"]["problems"] != []
    assert set(found["recheck"]) == {field.name for field in dataclasses.fields(Recheck)}


def other_classifier(like: Path, folder: Path) -> str:
    import torch
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(like, folder)
    model = AutoModelForSequenceClassification.from_pretrained(like)
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_teacher_with_other_ids_or_classes_is_told_so(
    built: BuildOptions, tiny_classifier: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    small = make_tiny_lm(tiny_tokenizer, tmp_path / "small", vocab_size=299)
    with pytest.raises(UsageError, match="299 ids"):
        recheck(Cache.open(built.out), [str(small)])
    classes = make_cache(tmp_path / "classes", [5])
    with pytest.raises(UsageError, match="has the classes"):
        recheck(classes, [str(tiny_classifier)])


@pytest.mark.slow
def test_a_teacher_with_a_head_of_its_own_width_is_run_again(
    tiny_classifier: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_classifier, teacher)
    encoder = AutoModel.from_pretrained(tiny_classifier)
    names = json.loads((teacher / "config.json").read_text())["id2label"]
    config = HeadedConfig(encoder.config, 4, id2label=names)
    HeadedForSequenceClassification(config, encoder).save_pretrained(teacher)
    built = BuildOptions(
        (str(teacher),), (str(labelled_corpus),), str(tmp_path / "cache"), limit=5, workers=0,
        task="sequence-classification",
    )  # fmt: skip
    build(built)
    assert recheck(Cache.open(built.out), [str(teacher)]).problems == ()
    words = make_cache(tmp_path / "words", [5], task="causal-lm")
    with pytest.raises(UsageError, match="no model for causal-lm"):
        recheck(words, [str(teacher)])


# Repair


@pytest.mark.slow
def test_what_is_broken_is_removed_and_the_same_build_makes_only_that_anew(
    copied: BuildOptions,
) -> None:
    options, folder = copied, Path(copied.out)
    whole = files(folder)
    digest = Cache.open(options.out).digest
    shards = sorted(name for name in whole if name.startswith("shards/"))
    assert len(shards) > 3

    flip(folder / shards[1], 12345)
    (folder / shards[2]).unlink()
    flip(folder / "tokenizer" / "tokenizer.json", 99)
    result = run("repair", options.out)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "tokenizer/tokenizer.json: broken, removed",
        f"{shards[1]}: broken, removed",
        f"{shards[2]}: missing",
        "Run the same `kdcache build` command again: it makes only these.",
    ]
    assert not (folder / shards[1]).exists()
    assert build(options).made == 2
    assert files(folder) == whole
    assert "nothing is broken" in run("repair", options.out).stdout

    for name in ("manifest.json", "spec.json"):
        flip(folder / name, 999)
        assert repair(RepairOptions(options.out)).removed == (name,)
        assert build(options).made == 0
        assert files(folder) == whole
    (folder / "spec.json").unlink()
    assert repair(RepairOptions(options.out)).missing == ("spec.json",)
    with pytest.raises(UsageError, match="not a kdcache cache"):
        build(dataclasses.replace(options, seed=5))  # this is another cache's
    build(options)
    assert files(folder) == whole
    assert Cache.open(options.out).digest == digest


@pytest.mark.slow
def test_an_unfinished_cache_is_repaired_too(copied: BuildOptions) -> None:
    options = copied
    whole = files(Path(options.out))
    (Path(options.out) / "manifest.json").unlink()
    shard = min((Path(options.out) / "shards").iterdir())
    flip(shard, 5000)
    with pytest.raises(CorruptCacheError):
        build(options)
    assert repair(RepairOptions(options.out)).removed == (f"shards/{shard.name}",)
    assert build(options).made == 1
    assert files(Path(options.out)) == whole


def test_nothing_is_left_to_repair_with(golden: Path) -> None:
    flip(golden / "spec.json", 99)
    flip(golden / "manifest.json", 99)
    before = files(golden)
    with pytest.raises(CorruptCacheError, match="needed to know what this cache is"):
        repair(RepairOptions(str(golden)))
    assert files(golden) == before
    with pytest.raises(UsageError, match="not a kdcache cache"):
        repair(RepairOptions(str(golden.parent)))


def test_a_digest_changes_only_if_asked(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "a", [4, 5, 6])
    # What another machine makes of the second span: other last bits.
    data = cache.read(1)
    nudged = {"logits": np.nextafter(data.targets.columns["logits"], np.float32(9))}
    data = dataclasses.replace(data, targets=SoftTargets(cache.codec(), nudged))
    cache.storage.remove(f"shards/{cache.manifest.shards[1].name}")
    assert cache.missing() == [1]
    with pytest.raises(CorruptCacheError, match="00001-.* is missing"):
        cache.read(1)
    with pytest.raises(IncompleteError, match="1 of 3 spans"):
        repair(RepairOptions(cache.url, reseal=True))

    again = Cache.open(cache.url)
    entry = again.commit(1, data)
    assert again.missing() == [1]
    with pytest.raises(KdcacheError, match="another kind of machine"):
        prepare_manifest(again, [entry])
    assert Cache.open(cache.url).digest == cache.digest
    result = repair(RepairOptions(cache.url))
    assert (result.removed, result.digest) == ((), cache.digest)

    result = repair(RepairOptions(cache.url, reseal=True))
    assert result.old_digest == cache.digest
    assert result.digest == Cache.open(cache.url).digest != cache.digest
    assert list(problems(Cache.open(cache.url))) == []
    assert Cache.open(cache.url).manifest.shards[1] == entry
    assert repair(RepairOptions(cache.url, reseal=True)).old_digest is None


def test_a_shard_made_anew_with_the_same_bytes_leaves_the_manifest_alone(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "a", [4, 5])
    before = files(tmp_path / "a")
    data = cache.read(0)
    cache.storage.remove(f"shards/{cache.manifest.shards[0].name}")
    again = Cache.open(cache.url)
    entry = again.commit(0, data)
    assert seal(again, prepare_manifest(again, [entry])) == cache.manifest
    assert files(tmp_path / "a") == before


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/spec.json")))
def test_a_shard_of_an_earlier_version_is_made_again_with_its_bytes(
    name: str, tmp_path: Path
) -> None:
    cache = Cache.open(str(shutil.copytree(GOLDEN / name, tmp_path / "golden")))
    before = files(tmp_path / "golden")
    data, said = cache.read(0), cache.manifest.shards[0]
    cache.storage.remove(f"shards/{said.name}")
    facts = {"skipped": said.skipped, "clipped_mass": said.clipped_mass}
    assert Cache.open(cache.url).commit(0, data, **facts) == said
    assert files(tmp_path / "golden") == before


def test_a_build_follows_the_form_in_which_its_cache_was_begun(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "topk-1-2", tmp_path / "golden")
    before, old = files(folder), Cache.open(str(folder))
    beside = {"tokenizer_files": old.tokenizer_files(), "ranks": old.read_beside("ranks.u32")}
    new = dataclasses.replace(old.spec, levels=True)
    notes = dict(old.notes)
    assert Cache.create_or_resume(str(folder), new, notes=notes, **beside).spec == old.spec
    assert files(folder) == before
    with pytest.raises(UsageError, match="seed: 0 -> 1"):
        Cache.create_or_resume(str(folder), dataclasses.replace(new, seed=1), **beside)
    fresh = Cache.create_or_resume(str(tmp_path / "new"), new, **beside)
    assert fresh.spec.levels
    assert fresh.spec.fingerprint != old.spec.fingerprint


# What crashed builds leave


def test_gc_removes_what_is_left_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = make_cache(folder, [4, 5])
    whole = files(folder)
    scratch = folder / "tmp"
    scratch.mkdir()
    left, foreign = scratch / ("a" * 32 + ".tmp"), scratch / "mine.txt"
    for path in (left, foreign):
        path.write_bytes(b"12345")
    second = folder / "shards" / "00001-0123456789abcdef.h5"
    second.write_bytes(b"1234567")

    with contextlib.closing(cache.storage.share("spec.json")):  # type: ignore[arg-type]
        dry = run("gc", str(folder), "--dry-run")
    assert dry.exit_code == 0
    assert dry.stdout.splitlines() == [
        f"shards/{second.name}: 7 B",
        "1 file would be removed, 7 B; 1 kept, since a build may be at work.",
    ]
    assert second.exists()
    result = gc(GcOptions(str(folder)))
    assert (result.bytes, len(result.removed), result.young) == (12, 2, 0)
    assert files(folder) == whole | {"tmp/mine.txt": b"12345"}
    assert gc(GcOptions(str(folder))).removed == ()

    # The copy of a span whose own shard is gone may be what takes its place.
    second.write_bytes(b"1234567")
    cache.storage.remove(f"shards/{cache.manifest.shards[1].name}")
    assert gc(GcOptions(str(folder))).removed == ()


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    victim = make_cache(tmp_path / "victim", [4, 5, 6])
    shutil.copytree(tmp_path / "victim", tmp_path / "trap")
    trap = make_cache(tmp_path / "other", [7])
    shutil.copy(Path(trap.url) / "manifest.json", tmp_path / "trap")
    shutil.copy(Path(trap.url) / "spec.json", tmp_path / "trap")
    shutil.rmtree(tmp_path / "trap" / "shards")
    (tmp_path / "trap" / "shards").symlink_to(tmp_path / "victim" / "shards")
    for command in ("gc", "repair"):
        result = run(command, str(tmp_path / "trap"))
        assert result.exit_code == 2
        assert "is a link" in result.stderr
    assert list(problems(victim)) == []
