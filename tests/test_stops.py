"""Trainings that are stopped: killed at every moment, interrupted, out of disk, or started twice.

After each the same command ends with the student of a run that was left alone.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import further
from loaded import Program
from make_caches import make_cache
from small_runs import SMALL, StopError, metrics, same, stop_at

from kdcache.cli.main import cli
from kdcache.commands.run_folder import TrainProgress, TrainResult
from kdcache.commands.train import run as run_module
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RunPlan
from kdcache.commands.train.train import train
from kdcache.errors import IncompleteError, UsageError
from kdcache.files import LOCK_FILE, alone
from kdcache.student.checkpoints import STATE_FILE, last_checkpoint, step_of

pytestmark = pytest.mark.slow

Make = Callable[..., TrainOptions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches `classes` (45 rows, so 6 steps an epoch) and `held` (20 rows)."""
    folder = tmp_path_factory.mktemp("stops")
    make_cache(folder / "classes", [20, 14, 11])
    make_cache(folder / "held", [20], first=500)
    return folder


def options_of(folder: Path, **changes: Any) -> TrainOptions:
    """A small run with a checkpoint every two steps."""
    values: dict[str, Any] = {
        "cache": str(folder / "classes"), "eval_cache": str(folder / "held"), "eval_steps": 2,
        "student": "bilstm", "batch_size": 8, "epochs": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", **SMALL,
    }  # fmt: skip
    return TrainOptions(**(values | changes))


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> Make:
    """Options of that run in this test's own folder."""
    return lambda **changes: options_of(folder, **{"out": str(tmp_path / "run"), **changes})


@pytest.fixture(scope="module")
def whole(folder: Path) -> TrainResult:
    """That run, undisturbed, with all of its checkpoints."""
    return train(options_of(folder, out=str(folder / "whole"), keep_checkpoints=99))


EARLY = {"learning_rate": 0.5, "epochs": 40, "patience": 2}


@pytest.fixture(scope="module")
def early(folder: Path) -> TrainResult:
    """One that stops early, undisturbed."""
    return train(options_of(folder, out=str(folder / "early"), **EARLY))


def stop(*_: Any) -> None:
    raise StopError


_WRITES = os.O_WRONLY | os.O_RDWR
_CHANGES = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")


class Watch:
    """Calls `act(event, path)` before each change of a file or folder below `place`."""

    def __init__(self) -> None:
        self.place: str | None = None
        self.act: Callable[[str, str], None] = lambda *_: None
        sys.addaudithook(self._hook)  # for as long as the process lives

    def _hook(self, event: str, facts: tuple[Any, ...]) -> None:
        if self.place is None or event not in _CHANGES:
            return
        if event == "open" and not (isinstance(facts[2], int) and facts[2] & _WRITES):
            return
        paths = [str(fact) for fact in facts[:2]]
        if event in ("os.remove", "os.rmdir") and facts[1] != -1:
            paths = [os.path.join(os.readlink(f"/proc/self/fd/{facts[1]}"), paths[0])]
        if any(path.startswith(self.place) for path in paths):
            place, self.place = self.place, None  # what `act` does is not watched
            try:
                self.act(event, paths[0])
            finally:
                self.place = place


@pytest.fixture(scope="module")
def watcher() -> Watch:
    """One hook for all tests: it can't be removed."""
    return Watch()


@pytest.fixture
def watch(watcher: Watch) -> Iterator[Watch]:
    """The hook, at rest before and after."""
    yield watcher
    watcher.place = None


# Killed


@pytest.mark.end_to_end
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_killed_at_moments_of_saving_and_rotation(
    options: Make, whole: TrainResult, tmp_path: Path, watch: Watch, every: bool
) -> None:
    """What a kill leaves is the folder as it was at that moment: it is copied there."""
    moments: list[Path] = []
    copies = tmp_path / "copies"
    copies.mkdir()

    def copy(event: str, path: str) -> None:
        if not (tmp_path / "run").is_dir():
            return
        shutil.copytree(tmp_path / "run", copies / f"{len(moments)}")
        moments.append(copies / f"{len(moments)}")

    watch.act, watch.place = copy, str(tmp_path / "run")
    train(options())
    watch.place = None
    assert len(moments) > 50
    steps = []
    for moment in moments:
        found = last_checkpoint(moment)
        steps.append(step_of(found) if found else 0)
        for path in found.iterdir() if found else ():
            if path.suffix != ".json":  # these hold times and paths
                assert path.read_bytes() == Path(whole.out, found.name, path.name).read_bytes()
    assert steps == sorted(steps), "no moment falls back"
    assert {*steps} == {0, 2, 4, 6, 8, 10, 12}
    # Of the moments with each checkpoint: the first and the last, with the next one half there.
    picked = {step: i for i, step in enumerate(steps)} | {-s: steps.index(s) for s in (4, 12)}
    for i in picked.values() if every else (picked[-4], picked[8], picked[12]):
        result = train(options(out=str(moments[i])))
        assert same(moments[i], whole.out)
        assert result.steps == 12


def test_a_checkpoint_that_lacks_a_byte_is_passed_over(options: Make, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        train(options(), on_progress=stop_at(7))
    six = Path(options().out, "checkpoint-6")
    files = [path for path in six.iterdir() if path.name != "kdcache_state.json"]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert step_of(last_checkpoint(six.parent) or six) == 4
        with pytest.raises(UsageError, match=f"{len(content) - 1} bytes of {path.name} instead of"):
            train(options(resume=str(six)))
        path.unlink()
        with pytest.raises(UsageError, match=f"lacks {path.name}: it is not a whole checkpoint"):
            train(options(resume=str(six)))
        path.write_bytes(content)
    assert last_checkpoint(six.parent) == six
    (six / "kdcache_state.json").write_text("{}")
    assert step_of(last_checkpoint(six.parent) or six) == 4


def test_a_checkpoint_with_a_damaged_byte_is_refused(options: Make) -> None:
    """Of weights it was trained on, others than were saved; of the rest most were tracebacks."""
    with pytest.raises(StopError):
        train(options(), on_progress=stop_at(7))
    six = Path(options().out, "checkpoint-6")
    names = {path.name for path in six.iterdir()} - {"kdcache_state.json"}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} < names
    for name in sorted(names):
        content = (six / name).read_bytes()
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        (six / name).write_bytes(damaged)
        for resume in ("auto", str(six)):
            with pytest.raises(UsageError, match=f"checkpoint-6 has a damaged {name}"):
                train(options(resume=resume))
        (six / name).write_bytes(content)
    assert train(options()).steps == 12


def test_going_back_forgets_what_came_later(
    options: Make, whole: TrainResult, tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        train(options(), on_progress=stop_at(9))
    back = options(resume=str(tmp_path / "run" / "checkpoint-6"))
    with pytest.raises(StopError):
        train(back, on_progress=stop_at(9))
    assert step_of(last_checkpoint(tmp_path / "run") or tmp_path) == 8
    train(options())
    assert same(tmp_path / "run", whole.out)


def test_a_run_whose_folder_moved_ends_with_its_best_weights(
    options: Make, early: TrainResult, tmp_path: Path
) -> None:
    assert early.best_step == early.steps - 4
    last = early.steps - 1
    with pytest.raises(StopError):
        train(options(**EARLY), on_progress=stop_at(last))
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = options(out=str(tmp_path / "moved"), **EARLY)
    assert train(moved).best_step == early.best_step
    assert same(moved.out, early.out)
    (tmp_path / "moved" / "train.json").unlink()
    shutil.rmtree(tmp_path / "moved" / f"checkpoint-{early.best_step}")
    with pytest.raises(UsageError, match=f"checkpoint-{early.best_step} has no kdcache_state"):
        train(moved)


@pytest.mark.parametrize("moment", ["checkpoint", "student"])
def test_a_run_that_stopped_early_takes_no_step_more(
    options: Make, early: TrainResult, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    assert early.steps < 240
    with monkeypatch.context() as patched:
        if moment == "checkpoint":  # right after the last one
            patched.setattr(run_module.DistillationTrainer, "_load_best_model", stop)
        else:
            patched.setattr(run_module, "_save", stop)
        with pytest.raises(StopError):
            train(options(**EARLY))
    seen: list[int] = []
    result = train(options(**EARLY), on_progress=lambda now: seen.append(now.step))
    assert not seen
    assert (result.steps, result.best_step) == (early.steps, early.best_step)
    assert (result.loss, result.eval) == (early.loss, pytest.approx(early.eval, abs=60))
    assert same(result.out, early.out)
    # More patience is more steps.
    Path(result.out, "train.json").unlink()
    assert train(options(**EARLY | {"patience": 4})).steps > early.steps


def names(folder: Path) -> set[str]:
    """All files below a folder but its lock."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if not name.endswith(".lock")}


@pytest.mark.parametrize("after", [*further(4), 12])
def test_a_run_that_was_killed_leaves_what_one_does_that_was_not(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed while it deleted its oldest checkpoint and wrote; or so after its last step."""
    out, scratch = Path(options().out), f".{'0123456789abcdef' * 2}.tmp"
    with monkeypatch.context() as patched, pytest.raises(StopError):
        if after == 12:
            patched.setattr(run_module, "_save", stop)
        train(options(), on_progress=stop_at(after + 1))
    for checkpoint in ("checkpoint-1", f"checkpoint-{after - 1}"):
        (out / checkpoint).mkdir()
        (out / checkpoint / "optimizer.pt").write_bytes(b"123")
    (out / "student.tmp").mkdir()
    for folder in (out, out / "student.tmp"):
        (folder / scratch).write_bytes(b"123")
    train(options())
    train(options(out=str(tmp_path / "other")))
    assert names(out) == names(tmp_path / "other")
    assert all((path / STATE_FILE).is_file() for path in out.glob("checkpoint-*"))


# Interrupted


@pytest.mark.parametrize(
    ("sign", "lost"),
    [
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_ends_a_training_in_order(
    options: Make, whole: TrainResult, tmp_path: Path, sign: signal.Signals, lost: bool
) -> None:
    """One that a library swallowed (its exception could not leave a callback) is found again."""
    last: list[int] = []

    def strike(now: TrainProgress) -> None:
        last.append(now.step)
        if now.step == 5:
            try:
                signal.raise_signal(sign)
            except KeyboardInterrupt:
                if not lost:
                    raise

    before = signal.getsignal(sign)
    with pytest.raises(IncompleteError) as told:
        train(options(), on_progress=strike)
    four = tmp_path / "run" / "checkpoint-4"
    assert str(told.value) == f"interrupted. The same command continues from step 4 ({four})."
    assert last[-1] == 5
    assert signal.getsignal(sign) is before
    train(options())
    assert same(options().out, whole.out)


def test_a_training_without_a_checkpoint_says_so(options: Make) -> None:
    with pytest.raises(IncompleteError, match="There is no checkpoint yet: the same command sta"):
        train(options(), on_progress=lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(IncompleteError, match="--resume auto continues from step 2"):
        train(
            options(resume="never"),
            on_progress=lambda now: signal.raise_signal(signal.SIGINT) if now.step == 3 else None,
        )


def command(options: TrainOptions) -> list[str]:
    """The words of the program for these options."""
    words = ["kdcache", "train"]
    for name, value in options.to_dict().items():
        default = getattr(TrainOptions("?", "?", "?"), name)
        for each in value if isinstance(value, list) else [value]:
            if value != (list(default) if isinstance(default, tuple) else default):
                words += [f"--{name.replace('_', '-')}", str(each)]
    return words


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "sign", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.exhaustive)]
)
def test_a_training_process_that_is_ended_goes_on(
    options: Make, tmp_path: Path, sign: signal.Signals
) -> None:
    chosen = options(epochs=400)
    process = Program(*command(chosen))
    run = Path(chosen.out)
    while process.returncode is None and not last_checkpoint(run):
        time.sleep(0.02)
    process.send_signal(sign)
    errors = process.communicate(timeout=120)
    if sign != signal.SIGKILL:
        assert process.returncode == 3
        (line,) = [x for x in errors.splitlines() if x.strip()][-1:]
        assert line.startswith("Error: interrupted. The same command continues from step ")
        assert "Traceback" not in errors
    short = options()  # the length may change
    train(short)
    assert metrics(run)[-1]["step"] >= 12


# Disk


def refuse_writes(watch: Watch, place: str, count: int) -> None:
    """From the `count`-th file that is opened for writing below `place` on, the disk is full."""
    left = [count]

    def act(event: str, path: str) -> None:
        if event in ("open", "os.mkdir"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    watch.act, watch.place = act, place


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "counts",
    [
        (1, 19, 46, 64, 73, 999),
        pytest.param((*range(1, 60, 9), *range(60, 90, 3)), marks=pytest.mark.exhaustive),
    ],
    ids=["some", "every"],
)
def test_a_disk_that_is_full_at_any_write(
    options: Make, whole: TrainResult, watch: Watch, counts: tuple[int, ...]
) -> None:
    run = Path(options().out)
    for count in counts:
        refuse_writes(watch, str(run), count)
        told = ""
        try:
            train(options())
        except IncompleteError as error:
            told = str(error)
        finally:
            watch.place = None
        found = last_checkpoint(run)
        assert told.startswith(f"no space left on {run}") == (not (run / "train.json").exists())
        assert not told or found is None or f"continues from step {step_of(found)} (" in told
        assert len(list(run.glob("checkpoint-*"))) <= 2, "half a checkpoint takes no room"
    assert (run / "train.json").exists()
    assert same(run, whole.out)


@pytest.mark.parametrize("limit", [pytest.param(10_000, marks=pytest.mark.exhaustive), 20_000])
def test_files_that_may_not_grow(options: Make, whole: TrainResult, limit: int) -> None:
    """Errors of torch's and safetensors' own writers: weights and optimizer are larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(IncompleteError, match="no space left on"):
            train(options())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train(options())
    assert same(options().out, whole.out)


# Two at once


def test_a_second_training_on_one_folder_is_refused(options: Make) -> None:
    tried: list[int] = []

    def second(now: TrainProgress) -> None:
        tried.append(now.step)
        with pytest.raises(UsageError, match="another training is running in .*run. Wait for it"):
            train(options())

    train(options(max_steps=2), on_progress=second)
    assert tried
    assert not train(options(max_steps=2)).made


def test_a_folder_in_which_another_process_begins_and_gives_up_is_no_strange_one(
    options: Make,
) -> None:
    plan, over = RunPlan.make(options()), threading.Event()

    def begin() -> None:
        while not over.is_set():
            with alone(plan.out, "training"):
                pass

    with futures.ThreadPoolExecutor() as pool:
        other = pool.submit(begin)
        try:
            for _ in range(1000):
                assert plan.finished() is None
        finally:
            over.set()
        other.result()


def test_wrong_students_leave_no_folder(options: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        train(options(student=str(tmp_path / "none")))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).touch()  # of a run that was killed
    train(options(max_steps=1))


@pytest.mark.parametrize("url", ["gs://bucket/run", "hf://x/y", "nowhere://x"])
def test_an_address_that_cannot_be_opened_makes_no_folder_here(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=url.partition("//")[0]):
        train(options(out=url))
    assert not list(tmp_path.iterdir())


# What every command that fills a folder does


@pytest.fixture
def work(folder: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Words of such commands, all but --out."""
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"cache: {folder / 'classes'}\nstudent: bilstm\ngrid: {{seed: [0]}}\n")
    return {
        "train": ["train", "--cache", str(folder / "classes"), "--student", "bilstm"],
        "sweep": ["sweep", str(grid), "--workers", "0"],
        "finetune": ["finetune", "--model", "m", "--corpus", "c.tsv"],
        "demo": ["demo"],
    }


NOUNS = {
    "train": ("training", "run of kdcache"), "sweep": ("sweep", "sweep of kdcache"),
    "finetune": ("fine-tuning", "teacher of kdcache finetune"), "demo": ("demo", "demo"),
}  # fmt: skip


def refused(words: list[str], out: Path | str) -> str:
    """What a command prints that cannot begin."""
    result = CliRunner().invoke(cli, [*words, "--out", str(out)])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("name", NOUNS)
def test_no_command_takes_over_a_folder_of_something_else(
    work: dict[str, list[str]], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    assert f"is not empty and not a {NOUNS[name][1]}. Choose another" in refused(work[name], out)
    assert [path.name for path in out.iterdir() if path.name != LOCK_FILE] == ["thesis.tex"]


@pytest.mark.parametrize("name", NOUNS)
def test_no_command_works_where_another_process_does(
    work: dict[str, list[str]], tmp_path: Path, name: str
) -> None:
    noun = NOUNS[name][0]
    with alone(tmp_path / ("out.tmp" if name == "finetune" else "out"), noun):
        assert f"another {noun} is running in" in refused(work[name], tmp_path / "out")


@pytest.mark.parametrize("name", ["sweep", "finetune", "predict", "demo"])
def test_no_command_makes_a_folder_of_an_address(
    work: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    work["predict"] = ["predict", "--student", "s", "--corpus", "c.tsv"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    told = refused(work[name], "s3://bucket/out")
    assert "--out is s3://bucket/out, expected a folder or file on this machine" in told
    assert not list(Path().iterdir())
