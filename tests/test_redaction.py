"""Secrets in addresses (signatures, passwords) reach no output, no log and no file."""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from loaded import Program

from kdcache.cli.main import cli
from kdcache.commands.build.workers import EventLog
from kdcache.corpus import Corpus
from kdcache.errors import UsageError
from kdcache.files import write_json
from kdcache.humanize import redacted
from kdcache.storage import open_storage
from kdcache.student.checkpoints import check_identity

DEADLINE = 60.0


def python(code: str, *words: str) -> tuple[int, str]:
    """Exit code and output of a process of this Python that runs `code`."""
    program = Program("python", "-c", code, *words)
    said = program.communicate()
    return program.returncode or 0, said


def build(teacher: Path, corpus: str, out: Path, *more: str) -> list[str]:
    """The words of a small build in one process."""
    given = {"--teacher": teacher, "--corpus": corpus, "--out": out, "--workers": 0}
    small = {"--max-length": 64, "--codec": "sample:8", "--shard-tokens": 600}
    return ["build", *(str(w) for pair in (given | small).items() for w in pair), *more]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which a web server shows it."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(Handler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(DEADLINE)


def test_the_signature_of_an_address_goes_nowhere(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, at = web
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    corpus = Corpus.open([f"{at}/a.jsonl?X-Amz-Signature=feedbeef"], span_bytes=1000)
    texts = [record.values["text"] for record in Corpus.read(corpus.spans[0])]
    assert texts == ["one"]
    assert "feedbeef" not in json.dumps(corpus.identity())
    missing = "http://127.0.0.1:1/b.xyz?X-Amz-Signature=feedbeef"
    result = CliRunner().invoke(
        cli,
        ["build", "--teacher", str(tmp_path), "--corpus", missing, "--out", str(tmp_path / "c")],
    )
    assert result.exit_code == 2
    assert "feedbeef" not in result.output


@pytest.mark.end_to_end
def test_a_build_from_signed_addresses_keeps_no_signature(
    web: tuple[Path, str], tiny_lm: Path, tmp_path: Path
) -> None:
    folder, at = web
    (folder / "a.jsonl").write_text('{"text": "one fine text"}\n{"text": \n')
    corpus, out = f"{at}/a.jsonl?X-Amz-Signature=feedbeef", tmp_path / "cache"
    failed = CliRunner().invoke(cli, build(tiny_lm, corpus, out / "fail"))
    skip = build(tiny_lm, corpus, out / "skip", "--on-error", "skip")
    code, said = python("from kdcache.cli.main import main; main()", "--verbose", *skip)
    assert (failed.exit_code, code) == (2, 0), said
    for told in (failed.output, said):
        assert f"{at}/a.jsonl" in told  # the bad record is named
        assert "feedbeef" not in told
    kept = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {"events.jsonl", "spec.json", "manifest.json"} <= kept.keys()
    assert [name for name, data in kept.items() if b"feedbeef" in data] == []


LEAK = """
import click, logging
from kdcache.cli import main as program

def leak(address="http://me:feedbeef@host/a?X-Amz-Signature=feedbeef"):
    try:
        raise OSError(address)
    except OSError as error:
        logging.getLogger("aiohttp").warning("no answer: %s", address, exc_info=True)
        raise RuntimeError(f"nobody expects {address}") from error

program.load = lambda name: click.Command(name, callback=leak)
program.main()
"""


@pytest.mark.slow
def test_logs_and_tracebacks_of_the_program_are_redacted() -> None:
    code, said = python(LEAK, "build")
    assert code == 1
    assert "WARNING aiohttp: no answer: http://host/a\n" in said
    assert "Error: RuntimeError: nobody expects http://host/a" in said
    kept = Path(re.findall(r"The traceback is in (\S+);", said)[0])
    assert "RuntimeError: nobody expects http://host/a\n" in kept.read_text()
    assert "feedbeef" not in kept.read_text()
    kept.unlink()
    assert "feedbeef" not in said


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("--engine-arg hf_token=feedbeef x", "--engine-arg hf_token=*** x"),
        ("{'api_key': 'feed beef', 'n': 1}", "{'api_key': ***, 'n': 1}"),
        ('"AWS_SECRET_ACCESS_KEY": "feed\\u0020beef"', '"AWS_SECRET_ACCESS_KEY": ***'),
        ("my-password='feed beef'", "my-password=***"),
        ("authToken=feedbeef&x=1", "authToken=***&x=1"),
        *((same, same) for same in ("eos_token=</s>", "a token: 5", "tokens=5", "tokenizer=x")),
        *((same, same) for same in ("max_num_batched_tokens=512", "broken=1", "pad_token_id=0")),
    ],
)
def test_what_is_given_to_the_name_of_a_secret_is_one(text: str, left: str) -> None:
    assert redacted(text) == left
    assert redacted([text, {"x": text}]) == [left, {"x": left}]
    begin = time.process_time()
    redacted("a_auth-token" * 5000)  # of a corpus, in an error: no text may hold this up
    assert time.process_time() - begin < 5


def test_a_document_is_written_without_secrets(tmp_path: Path) -> None:
    secret = {"hf_token": "feedbeef", "api-key": 5, "x": {"password": ["feedbeef"]}}
    kept = {"eos_token": "</s>", "tokenizer": "a", "tokens": 3, "token_ids": [1.5, None, True]}
    write_json(tmp_path / "a.json", {**secret, **kept})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": {}, **kept}


def test_a_run_goes_on_with_another_signature_of_its_student() -> None:
    student = "https://host/student?Signature="
    here = {"identity": {"student": f"{student}feedbeef", "seed": 1}}
    check_identity(here, {"student": f"{student}other", "seed": 1}, "x")
    with pytest.raises(UsageError, match="seed: 1 -> 2") as refused:
        check_identity(here, {"student": f"{student}other", "seed": 2}, "x")
    assert "feedbeef" not in str(refused.value)


def test_events_are_redacted(tmp_path: Path) -> None:
    log = EventLog(open_storage(str(tmp_path)))
    log("span failed", span=3, error="403 of http://me:feedbeef@host/a?X-Amz-Signature=feedbeef")
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["error"] == "403 of http://host/a"
