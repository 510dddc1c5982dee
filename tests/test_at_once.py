"""Two commands at once on one place: one works, and the other one does or says what is so.

Whatever moment of the first it is at which the second runs: see `at_once`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from at_once import at_each_moment

from kdcache.errors import UsageError
from kdcache.files import LOCK_FILE, alone, clear


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for what two commands write."""
    return tmp_path / "place"


def is_refused(outcome: object, work: str) -> bool:
    """Whether a command was refused because another one is at work."""
    return isinstance(outcome, UsageError) and f"another {work} is running" in str(outcome)


@pytest.mark.parametrize("removes", [False, True])
def test_two_begin_in_one_folder_and_give_it_up(place: Path, removes: bool) -> None:
    def begin() -> None:
        with alone(place / "run", "training"):
            if removes:
                (place / "run" / "checkpoint-1").mkdir()
                (place / "run" / "metrics.jsonl").touch()
                clear(place / "run")

    refused = 0
    for both in at_each_moment(place, begin, begin):
        for outcome in (both.first, both.second):
            assert outcome is None or is_refused(outcome, "training"), both
        refused += is_refused(both.second, "training")
        assert not (place / "run").exists(), both
    assert refused >= 2


def test_who_begins_keeps_the_folder_that_another_gives_up(place: Path) -> None:
    def give_up() -> None:
        with alone(place / "run", "training"):
            pass

    def work() -> None:
        with alone(place / "run", "training"):
            (place / "run" / "metrics.jsonl").touch()

    worked = 0
    for both in at_each_moment(place, give_up, work):
        found = sorted(path.name for path in place.glob("run/*"))
        if both.second is None:
            worked += 1
            assert found == [LOCK_FILE, "metrics.jsonl"], both
        else:
            assert is_refused(both.second, "training"), both
            assert not found, both
    assert worked >= 2
