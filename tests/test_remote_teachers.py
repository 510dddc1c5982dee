"""Teachers in an object store and on the hub: fetched once a node, known by what is listed."""

# ruff: noqa: F811  # fixtures of another module
from __future__ import annotations

import dataclasses
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub
import numpy as np
import pytest

pytest.importorskip("moto")

from conftest import make_tiny_lm
from faulty_s3 import Fault, Proxy
from test_object_storage import proxy, server, url  # noqa: F401

from kdcache.cache import Cache
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import prepare
from kdcache.errors import UsageError
from kdcache.storage import open_storage, sha256_file
from kdcache.teacher import TeacherFiles
from kdcache.teacher.load import load_models


def upload(folder: Path, url: str) -> None:
    storage = open_storage(url)
    for path in folder.iterdir():
        storage.write(path.name, path.read_bytes())


def counting(proxy: Proxy, pattern: str) -> Fault:
    """A fault that never strikes, and counts."""
    fault = Fault("error", pattern, every=1 << 40)
    proxy.faults.append(fault)
    return fault


@pytest.fixture
def options(small_build: BuildOptions, url: str, tiny_lm: Path) -> BuildOptions:
    """A small build whose teacher is in S3."""
    upload(tiny_lm, url)
    return dataclasses.replace(small_build, teacher=(url,), max_length=32, codec="dense", limit=20)


@pytest.mark.slow
def test_a_teacher_in_s3_gives_what_a_local_one_gives(
    options: BuildOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    build(options)
    local = dataclasses.replace(options, teacher=(str(tiny_lm),), out=str(tmp_path / "local"))
    build(local)
    here, there = Cache.open(local.out), Cache.open(options.out)
    assert here.spec.teachers != there.spec.teachers, "one is known by checksums of the store"
    for column, values in here.read(0).targets.columns.items():
        np.testing.assert_array_equal(there.read(0).targets.columns[column], values)
    # From another address, and resumed: the same teacher.
    assert prepare(options).spec == there.spec


@pytest.mark.slow
def test_the_driver_reads_no_weights_and_a_node_fetches_them_once(
    options: BuildOptions, proxy: Proxy
) -> None:
    weights = counting(proxy, r"^GET /[^?]*\.safetensors")
    small = counting(proxy, r"^GET /[^?]*/config\.json")
    plan = prepare(options)
    assert (weights.seen, small.seen) == (0, 1)
    assert plan.teacher.names == options.teacher

    def look(_: int) -> str:
        files = TeacherFiles.find(options.teacher[0])
        assert (files.folder / "model.safetensors").stat().st_size == files.weight_bytes
        return files.sha256

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(look, range(4))) == {plan.spec.teachers[0]["sha256"]}
    assert (weights.seen, small.seen) == (1, 1)


def test_a_teacher_that_was_replaced_is_refused(
    options: BuildOptions, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    plan = prepare(options)
    assert len(load_models(plan.teacher)) == 1
    upload(make_tiny_lm(tiny_tokenizer, tmp_path / "other", seed=9), options.teacher[0])
    with pytest.raises(UsageError, match="was changed since this build began"):
        load_models(plan.teacher)
    assert prepare(options).spec.teachers != plan.spec.teachers


def test_no_model_at_a_url(url: str, tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(f"teacher {url} has no config.json")):
        TeacherFiles.find(url)
    shutil.copytree(tiny_lm, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    upload(tmp_path / "bare", url)
    with pytest.raises(UsageError, match="has no weights"):
        TeacherFiles.find(url, weights=False)


def test_a_store_without_checksums_has_its_weights_read(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "disk"))
    place = f"memory://{uuid.uuid4().hex}/model"
    upload(tiny_lm, place)
    found = TeacherFiles.find(place, weights=False)
    assert found.sha256 == TeacherFiles.find(str(tiny_lm)).sha256
    assert found.tokenizer.get_vocab() == TeacherFiles.find(str(tiny_lm)).tokenizer.get_vocab()


def test_the_hub_lists_what_identifies_a_teacher(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver fetches small files alone; the identity is that of the same files in a folder."""
    local = TeacherFiles.find(str(tiny_lm))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patterns: list[str] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision is None  # the newest
        patterns[:] = allow_patterns
        skip = shutil.ignore_patterns(*{"*.safetensors"} - set(allow_patterns))
        return str(shutil.copytree(tiny_lm, tmp_path / uuid.uuid4().hex, ignore=skip))

    weights = tiny_lm / "model.safetensors"
    lfs: Any = SimpleNamespace(sha256=sha256_file(weights))
    one = SimpleNamespace(rfilename=weights.name, size=weights.stat().st_size, lfs=lfs)
    config = SimpleNamespace(rfilename="config.json", size=7, lfs=None)
    info = SimpleNamespace(siblings=[config, one])
    with (
        mock.patch.object(huggingface_hub, "snapshot_download", snapshot),
        mock.patch.object(huggingface_hub.HfApi, "model_info", return_value=info) as asked,
    ):
        driver = TeacherFiles.find("team/teacher", weights=False)
        assert "*.safetensors" not in patterns
        assert (driver.sha256, driver.weight_bytes) == (local.sha256, local.weight_bytes)
        one.lfs = None  # a small file of the repository itself has no listed hash
        assert TeacherFiles.find("team/teacher", weights=False).sha256 == local.sha256
        assert "*.safetensors" in patterns
        asked.side_effect = ConnectionError("no network, but a copy in the hub's cache")
        assert TeacherFiles.find("team/teacher", weights=False).sha256 == local.sha256
        asked.reset_mock()
        assert TeacherFiles.find("team/teacher").sha256 == local.sha256
        assert not asked.called
