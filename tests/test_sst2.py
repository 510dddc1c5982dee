"""The example of SST-2: its transfer set, and the whole of it on a tiny teacher."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples/sst2"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The script, which imports `transfer` from beside it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(EXAMPLE))
        spec = importlib.util.spec_from_file_location("sst2_run", EXAMPLE / "run.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patched.setitem(sys.modules, "sst2_run", module)  # dataclasses look it up
        spec.loader.exec_module(module)
        yield module
        del sys.modules["transfer"]


@pytest.fixture(scope="module")
def transfer(example: ModuleType) -> ModuleType:
    return sys.modules["transfer"]


SENTENCES = [[f"n{i % 40}", "is", f"a{i % 25}", f"n{i % 31}"] * 3 for i in range(200)]
TAGS = [["N", "V", "A", "N"] * 3] * 200


def test_words_are_masked_and_replaced_as_often_as_the_rules_say(transfer: ModuleType) -> None:
    rules = transfer.Rules(variants=20, mask=0.1, pos=0.3, ngram=0.0)
    made = transfer.transfer_set(SENTENCES, TAGS, rules)
    kinds = Counter(word if word == "[MASK]" else word[0] for text in made for word in text.split())
    words = sum(kinds.values())
    assert all(len(text.split()) == 12 for text in made)
    # Replaced words keep their part of speech, so only masks change these shares.
    assert kinds["[MASK]"] / words == pytest.approx(0.1, abs=0.01)
    assert kinds["n"] / words == pytest.approx(0.9 / 2, abs=0.01)
    assert kinds["i"] / words == pytest.approx(0.9 / 4, abs=0.01)
    known = [" ".join(words) for words in SENTENCES]
    assert not set(known) & set(made)
    assert len(set(made)) == len(made)
    none = transfer.transfer_set(SENTENCES, None, transfer.Rules(mask=0.0, pos=0.5, ngram=0.0))
    assert none == []  # without tags nothing is replaced


def test_frequent_words_replace_more_often(transfer: ModuleType) -> None:
    sentences = [["often"], ["often"], ["often"], ["seldom"]]
    rules = transfer.Rules(variants=2000, mask=0.0, pos=1.0, ngram=0.0)
    variants = transfer._variants(sentences, [["X"]] * 4, rules, random.Random(0))
    drawn = Counter(variants)
    assert drawn["often"] / 8000 == pytest.approx(0.75, abs=0.02)


def test_n_grams_are_parts_of_their_sentence(transfer: ModuleType) -> None:
    rules = transfer.Rules(variants=5, mask=0.0, pos=0.0, ngram=1.0, shortest=2, longest=4)
    made = transfer.transfer_set(SENTENCES, TAGS, rules, seed=3)
    assert {len(text.split()) for text in made} == {2, 3, 4}
    whole = [" ".join(words) for words in SENTENCES]
    assert all(any(text in sentence for sentence in whole) for text in made)
    assert made == transfer.transfer_set(SENTENCES, TAGS, rules, seed=3)
    assert made != transfer.transfer_set(SENTENCES, TAGS, rules, seed=4)


@pytest.mark.parametrize(
    "wrong", [{"mask": 0.6, "pos": 0.6}, {"ngram": 1.5}, {"variants": 0}, {"shortest": 6}]
)
def test_rules_that_cannot_be(transfer: ModuleType, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must|probabilities"):
        transfer.Rules(**wrong)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_the_whole_example(
    example: ModuleType,
    tiny_classifier: Path,
    labelled_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib", reason="it draws a plot")
    monkeypatch.chdir(tmp_path)
    texts = [line.split("\t")[0] for line in labelled_corpus.read_text().splitlines()[1:]]
    Path("data").mkdir()
    for name, part in (("train", texts[:40]), ("dev", texts[40:60])):
        lines = [f"{text}\t{i % 2}\n" for i, text in enumerate(part)]
        Path(f"data/{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    Path("vectors.txt").write_text("the 0.1 0.2 0.3 0.4\nof 0.4 0.3 0.2 0.1\n")
    command = [
        "--data", "data", "--teacher", str(tiny_classifier), "--vectors", "vectors.txt",
        "--size", "4", "--hidden", "8", "--out", "work", "--seeds", "1", "--variants", "1",
        "--epochs", "1", "--sentence-epochs", "1",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"test\.tsv: no such file"):
        example.main([*command, "--only", "hard labels"])
    for only in ("hard labels", "+ both"):  # the second finds the caches and runs of the first
        example.main([*command, "--glue", "--only", only])
    table = Path("work/table.md").read_text().splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in table[2:]]
    assert names == ["hard labels, no vectors", "hard labels", "+ both", "teacher"]
    rows = [int(line.split(" | ")[2]) for line in table[2:-1]]
    assert rows[0] == rows[1] == 20  # the other 20 became the dev set
    assert rows[2] > 20
    assert Path("work/accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_gains_are_of_the_seeds_that_both_have(example: ModuleType) -> None:
    def row(name: str, seed: int, accuracy: float) -> dict[str, object]:
        return {"name": name, "seed": seed, "accuracy": accuracy, "teacher": 0.9, "rows": 10}

    hard = [row("hard labels", seed, value) for seed, value in enumerate((0.80, 0.82, 0.70))]
    both = [row("+ both", seed, value) for seed, value in enumerate((0.83, 0.87))]
    lines = example.table(hard + both).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells == [
        ["hard labels", "3", "10", "77.3", "6.4", "70.0 - 82.0", "", ""],
        ["+ both", "2", "10", "85.0", "2.8", "83.0 - 87.0", "+4.0 ± 1.0", "44%"],
        ["teacher", "", "", "90.0", "", "", "+12.7", ""],
    ]
    alone = example.table([row("+ both", 0, 0.8)]).splitlines()
    assert alone[2] == "| + both | 1 | 10 | 80.0 |  | 80.0 - 80.0 |  |  |"


def test_a_row_without_a_label_is_named(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("fine\t1\nno label\n")
    with pytest.raises(SystemExit, match="expected lines `text TAB 0 or 1`; row 1 is not one"):
        example.rows_of(path)
    path.write_text("")
    with pytest.raises(SystemExit, match="no rows"):
        example.rows_of(path)
