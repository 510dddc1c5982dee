"""Runs whose folder is in an object store: a real S3 server, killed uploads, several machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("moto")
pytest.importorskip("s3fs")

from faulty_s3 import Fault, Proxy, S3Server
from launched import launch
from make_caches import make_cache
from safetensors.torch import load as load_weights
from safetensors.torch import load_file
from small_runs import StopError, metrics, stop_at, without_times
from test_launched import BILSTM, stop_at_6
from test_object_storage import BUCKET, proxy, server  # noqa: F401

from kdcache.commands.run_folder import TrainProgress
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import CorruptCacheError, IncompleteError, UsageError
from kdcache.storage import filesystem, open_storage

pytestmark = pytest.mark.slow

Make = Callable[..., TrainOptions]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run-store")
    make_cache(folder / "classes", [20, 14, 11])
    make_cache(folder / "held", [20], first=500)
    return folder


@pytest.fixture(scope="module")
def undisturbed(caches: Path) -> Path:
    """A run in a folder, in one sitting."""
    out = caches / "undisturbed"
    train(TrainOptions(cache=str(caches / "classes"), out=str(out), **(BILSTM | {"dropout": 0.2})))
    return out


@pytest.fixture
def url(proxy: Proxy, request: pytest.FixtureRequest) -> str:  # noqa: F811
    name = request.node.name.replace("[", "-").replace("]", "").replace(" ", "-")
    return f"s3://{BUCKET}/runs/{name}/run"


@pytest.fixture
def options(caches: Path, url: str) -> Make:
    def make(out: str | Path = url, **changes: Any) -> TrainOptions:
        values: dict[str, Any] = {"cache": str(caches / "classes"), "out": str(out), **BILSTM}
        return TrainOptions(**(values | {"dropout": 0.2} | changes))

    return make


def same_run(found: dict[str, bytes], out: Path) -> None:
    """A finished run in the store is the one on the disk, to the bit."""
    assert without_times(found["metrics.jsonl"]) == metrics(out)
    theirs = load_file(out / "model.safetensors")
    mine = load_weights(found["model.safetensors"])
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert mine.keys() == theirs.keys()
    files = {path.name for path in out.iterdir() if path.is_file()} - {".lock"}
    assert files == {name for name in found if "/" not in name}
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {name.split("/")[0] for name in found if "/" in name}


def steps(found: dict[str, bytes]) -> list[int]:
    """Steps of the sealed checkpoints."""
    seals = [name.split("/")[0] for name in found if name.endswith("/kdcache_state.json")]
    return sorted(int(name.removeprefix("checkpoint-")) for name in seals)


def test_a_run_goes_on_elsewhere_to_the_bit(
    options: Make, caches: Path, url: str, server: S3Server, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    more: dict[str, Any] = {
        "eval_cache": str(caches / "held"), "eval_steps": 2, "save_steps": None, "patience": 9,
    }  # fmt: skip
    train(options(tmp_path / "here", **more))
    with pytest.raises(StopError):
        train(options(**more), on_progress=stop_at(7))
    found = server.objects(url)
    assert steps(found)[-1] == 6
    assert "train.json" not in found
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "another machine" / "disk"))
    result = train(options(**more))
    assert (result.out, result.made) == (url, True)
    same_run(server.objects(url), tmp_path / "here")
    left = (tmp_path / "another machine" / "disk-runs").rglob("*")
    assert {path.name for path in left if path.is_file()} <= {".lock"}
    again = train(options(**more))
    assert again == dataclasses.replace(result, made=False)
    with pytest.raises(UsageError, match=r"the finished run in s3://(.|\n)*batch_size: 8 -> 4"):
        train(options(**(more | {"batch_size": 4})))


@pytest.mark.parametrize(
    "match",
    [
        "^PUT .*/checkpoint-4/model.safetensors",
        pytest.param("^PUT .*/checkpoint-4/kdcache_state.json", marks=pytest.mark.exhaustive),
        pytest.param("^DELETE .*/checkpoint-2/kdcache_state.json", marks=pytest.mark.exhaustive),
        pytest.param("^PUT .*/run/config.json", marks=pytest.mark.exhaustive),
        "^PUT .*/run/train.json",
    ],
)
def test_an_upload_that_ends_anywhere_leaves_whole_checkpoints(
    match: str, options: Make, url: str, server: S3Server, proxy: Proxy,  # noqa: F811
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "_PATIENCE", 0.0)
        proxy.faults.append(Fault("reset", match))
        with pytest.raises(IncompleteError, match="has not answered successfully"):
            train(options())
    proxy.faults.clear()
    found = server.objects(url)
    assert "train.json" not in found
    for step in steps(found):
        seal = json.loads(found[f"checkpoint-{step}/kdcache_state.json"])
        held = {name: len(found[f"checkpoint-{step}/{name}"]) for name in seal["files"]}
        assert held == seal["files"]
    train(options())
    same_run(server.objects(url), undisturbed)


def test_the_training_that_began_last_owns_the_run(options: Make, url: str) -> None:
    def take_over(now: TrainProgress) -> None:
        if now.step == 3:
            open_storage(url).write("owner.json", b'{"id": "of another machine"}')

    with pytest.raises(UsageError, match=f"another training has begun in {url}"):
        train(options(), on_progress=take_over)
    assert train(options()).made


def test_damaged_bytes_are_found(
    options: Make, url: str, server: S3Server, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(StopError):
        train(options(), on_progress=stop_at(3))
    name = "checkpoint-2/model.safetensors"
    data = bytearray(server.objects(url)[name])
    data[-1] ^= 1
    open_storage(url).write(name, bytes(data))
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "another machine" / "disk"))
    with pytest.raises(CorruptCacheError, match=f"{url}/{name}: its bytes have another SHA-256"):
        train(options())


def test_a_folder_of_others_is_left_alone(options: Make, url: str) -> None:
    open_storage(url).write("notes.txt", b"mine")
    with pytest.raises(UsageError, match="is not empty and not a run of kdcache"):
        train(options())


@pytest.mark.end_to_end
def test_processes_of_two_machines_share_a_run(
    options: Make,
    caches: Path,
    url: str,
    server: S3Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Each has a disk of its own, with dropout's random state in every checkpoint."""
    disks = [
        {"KDCACHE_DISK": str(tmp_path / name / "disk"), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        for name in ("one", "two")
    ]
    more: dict[str, Any] = {
        "eval_cache": str(caches / "held"), "eval_steps": 2, "save_steps": None, "epochs": 1.3,
    }  # fmt: skip
    ends = launch(options(tmp_path / "here", **more), 2)
    assert [end.error for end in ends] == [None, None]
    ends = launch(options(**more), 2, look=stop_at_6, environments=disks)
    assert all(isinstance(end.error, IncompleteError) for end in ends), [e.error for e in ends]
    assert f"continues from step 4 ({url}/checkpoint-4)" in str(ends[0].error)
    ends = launch(options(**more), 2, environments=disks[::-1])
    assert [end.error for end in ends] == [None, None]
    same_run(server.objects(url), tmp_path / "here")
