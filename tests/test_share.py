"""`push` and `pull` against a stand-in hub with faults; the card; training from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import DATASET, Account, fake_hub
from make_caches import CAUSAL, make_cache

import kdcache
from kdcache.errors import CorruptCacheError, UsageError

TOKEN = "hf_thisIsASecretOfMine"
URL = f"hf://datasets/{DATASET}"
CODE = """
import json, sys
import kdcache
from kdcache.commands import share

share._FILES = 1  # of a commit
done = []
for command, *words in json.loads(sys.argv[1]):
    try:
        if command == "push":
            found = kdcache.push(kdcache.PushOptions(*words[:2], measured=tuple(words[2:])))
        elif command == "pull":
            found = kdcache.pull(kdcache.PullOptions(*words))
        elif command == "verify":
            found = kdcache.verify(kdcache.VerifyOptions(*words))
        elif command == "train":
            options = {"cache": (words[0],), "student": words[1], "out": words[2]}
            found = kdcache.train(kdcache.TrainOptions(**options, epochs=2, batch_size=4))
        elif command == "shard":
            found = len(kdcache.Cache.open(words[0]).read(int(words[1])))
        else:
            rows = kdcache.TargetStream(words[0], batch_size=2)
            found = sum(len(batch["labels"]) for batch in rows)
        done.append([type(found).__name__, getattr(found, "__dict__", found)])
    except kdcache.KdcacheError as error:
        done.append([type(error).__name__, str(error)])
print(json.dumps(done, default=str))
"""


@dataclass
class Hub:
    """A hub that keeps `files` for whoever has the token."""

    folder: Path
    files: dict[str, bytes]
    account: Account
    address: str

    def start(self, *commands: tuple[str, ...], token: str | None = TOKEN) -> subprocess.Popen[str]:
        environment = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "KDCACHE_DISK": str(self.folder / "disk"),
            **({"HF_TOKEN": token} if token else {}),
        }
        return subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps(commands)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *commands: tuple[str, ...], token: str | None = TOKEN) -> list[list[Any]]:
        """The outcomes of some commands, or their errors."""
        process = self.start(*commands, token=token)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert TOKEN not in out + err
        assert "Signature" not in out + err, out + err
        found: list[list[Any]] = json.loads(out.splitlines()[-1])
        return found


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files: dict[str, bytes] = {}
    account = Account(TOKEN)
    with fake_hub(files, account) as address:
        yield Hub(tmp_path, files, account, address)
    assert all(TOKEN.encode() not in data for data in files.values())


@pytest.fixture
def cache(tmp_path: Path) -> kdcache.Cache:
    return make_cache(
        tmp_path / "cache", [4, 3, 5], task=CAUSAL, codec="topk:4", domains=("a", "b", "c")
    )


def contents(cache: kdcache.Cache | Path) -> dict[str, bytes]:
    root = Path(cache if isinstance(cache, Path) else cache.storage.url)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.end_to_end
def test_there_and_back_through_a_bad_line(hub: Hub, cache: kdcache.Cache, tmp_path: Path) -> None:
    """One request of each kind fails the first time; the copy of the copy is the cache."""
    faults = {"create": 503, "preupload": 500, "batch": 502, "PUT": 0, "commit": 0, "tree": 504}
    faults |= {"resolve": 503}
    left = dict(faults)

    def fault(request: str) -> int | None:
        return next((left.pop(kind) for kind in list(left) if kind in request), None)

    hub.account.fault = fault
    measured = tmp_path / "verified.json"
    checked = {"cached": 0.001, "allowed": 0.002, "positions": 9, "same_teacher": True}
    measured.write_text(json.dumps({"digest": cache.digest, "recheck": checked}))
    copy = tmp_path / "copy"
    pushed, pulled, again, verified = hub.run(
        ("push", cache.storage.url, URL, str(measured)),
        ("pull", URL, str(copy)),
        ("push", cache.storage.url, URL),
        ("verify", URL),
    )
    assert not left
    assert hub.account.private is True
    own = contents(cache)
    card = hub.files["README.md"].decode()
    assert {n: d for n, d in hub.files.items() if n != "README.md"} == own == contents(copy)
    assert pushed[1]["files"] == pulled[1]["files"] == again[1]["present"] == len(own)
    assert (again[1]["files"], verified[1]["problems"]) == (0, [])
    head = yaml.safe_load(card.split("---")[1])
    assert head["task_categories"] == ["text-generation"]
    assert f"kdcache train --cache {URL} --student CONFIG_OR_MODEL --out run\n" in card
    for said in (cache.digest, "topk:4", "difference from live targets | 0.001", "## Licence"):
        assert said in card


@pytest.mark.end_to_end
def test_a_run_of_train_from_there_fetches_each_file_once(
    hub: Hub, cache: kdcache.Cache, tmp_path: Path
) -> None:
    hub.files |= {**contents(cache), "README.md": b"a card", "notes.bin": b"not of the cache"}
    student = {"model_type": "llama", "vocab_size": cache.spec.vocab_size, "hidden_size": 8}
    student |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "student.json").write_text(json.dumps(student))
    (found,) = hub.run(("train", URL, str(tmp_path / "student.json"), str(tmp_path / "run")))
    assert found[0] == "TrainResult", found
    fetched = [r.partition("/resolve/main/")[2] for r in hub.account.requests if "GET" in r]
    fetched = [name.partition("?")[0] for name in fetched if name]
    shards = [name for name in fetched if name.startswith("shards/")]
    assert sorted(shards) == sorted(f"shards/{one.name}" for one in cache.manifest.shards)
    assert not {"README.md", "notes.bin"} & {*fetched}


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", ["killed", "expired"])
def test_what_was_cut_short_goes_on(
    hub: Hub, cache: kdcache.Cache, tmp_path: Path, how: str
) -> None:
    """After the second commit: no reader takes the rest for a cache, and nothing is sent twice."""
    process: list[subprocess.Popen[str]] = []
    commits: list[str] = []

    def fault(request: str) -> int | None:
        commits.extend([request] * ("commit/main" in request))
        if len(commits) == 3:
            if how == "killed":
                process[0].kill()
                return 0
            hub.account.expired = True
        return None

    hub.account.fault = fault
    process.append(hub.start(("push", cache.storage.url, URL)))
    out, err = process[0].communicate(timeout=300)
    assert TOKEN not in out + err
    if how == "expired":
        ((kind, message),) = json.loads(out.splitlines()[-1])
        assert kind == "IncompleteError"
        assert "the credentials have expired" in message
    assert "manifest.json" not in hub.files
    assert len(hub.files) == 2
    hub.account.expired, hub.account.fault = False, lambda request: None
    read, pushed, stream = hub.run(
        ("pull", URL, str(tmp_path / "copy")), ("push", cache.storage.url, URL), ("stream", URL)
    )
    assert read[0] in ("IncompleteError", "UsageError")
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert pushed[1]["present"] == 2
    assert hub.account.requests.count("PUT") == len(cache.manifest.shards)
    assert stream == ["int", 12]


@pytest.mark.end_to_end
def test_training_from_there_reads_what_it_needs(hub: Hub, cache: kdcache.Cache) -> None:
    hub.files |= contents(cache)
    hub.account.private = True
    found, denied = hub.run(("shard", URL, "1"), ("push", cache.storage.url, URL + "s"))
    assert found == ["int", 3]
    assert denied[0] == "UsageError"
    shards = {request.split("/shards/")[1] for request in hub.account.requests if ".h5" in request}
    assert shards == {cache.manifest.shards[1].name}
    (wrong,) = hub.run(("push", cache.storage.url, URL), token="hf_anotherOne")
    assert wrong[0] == "UsageError"
    assert "HF_TOKEN" in wrong[1]


@pytest.mark.end_to_end
def test_what_is_not_this_cache_stays(hub: Hub, cache: kdcache.Cache, tmp_path: Path) -> None:
    """Other files and another cache are left alone, there and here."""
    hub.files |= contents(cache)
    other = make_cache(tmp_path / "other", [2], task=CAUSAL, codec="topk:4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = dict(hub.files)
    answers = hub.run(
        ("push", other.storage.url, URL),
        ("pull", URL, str(tmp_path / "full")),
        ("pull", URL, other.storage.url),
    )
    assert [kind for kind, _ in answers] == ["UsageError"] * 3
    assert "thesis.txt" in answers[1][1]
    assert hub.files == before


def test_a_pull_from_a_folder_and_a_file_that_changed(cache: kdcache.Cache, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    made = kdcache.pull(kdcache.PullOptions(cache.storage.url, str(copy)))
    assert contents(copy) == contents(cache)
    shard = copy / "shards" / cache.manifest.shards[0].name
    shard.write_bytes(b"damaged")
    again = kdcache.pull(kdcache.PullOptions(cache.storage.url, str(copy)))
    assert (again.files, again.present) == (1, made.files - 1)
    shard.write_bytes(b"damaged")
    with pytest.raises(CorruptCacheError):
        kdcache.pull(kdcache.PullOptions(str(copy), str(tmp_path / "third")))
    assert not (tmp_path / "third" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("to", "measured", "message"),
    [
        ("s3://bucket/cache", None, "is not hf://datasets/OWNER/NAME"),
        (URL + "/folder", None, "is not hf://datasets/OWNER/NAME"),
        (URL, "{}", "is not what"),
        (URL, '{"digest": "0", "recheck": null}', "is not of this cache"),
        (URL, '{"caches": []}', "is not of this cache"),
        (URL, None, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_can_not_be_pushed(
    cache: kdcache.Cache,
    tmp_path: Path,
    to: str,
    measured: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files: tuple[str, ...] = ()
    if measured is not None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        (tmp_path / "m.json").write_text(measured)
        files = (str(tmp_path / "m.json"),)
    with pytest.raises(UsageError, match=message):
        kdcache.push(kdcache.PushOptions(cache.storage.url, to, measured=files))
