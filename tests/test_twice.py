"""An option that takes one value and is given twice is refused, wherever it is given."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from make_caches import make_cache

from kdcache.cli import commands
from kdcache.cli.main import COMMANDS, cli
from kdcache.files import parse_yaml


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, [*words])


def test_of_two_rows_none_is_shown_without_a_word(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", [4])
    result = run("inspect", str(tmp_path / "cache"), "--row", "0", "--row", "1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--row is given twice: it takes one value." in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_of_each_command_takes_one_value_or_several(name: str) -> None:
    command = commands.load(name)
    assert isinstance(command, click.Command)
    for param in command.params:
        if not isinstance(param, click.Option) or param.is_flag or param.count:
            continue
        result = run(name, param.opts[0], "1", param.opts[0], "1")
        assert result.exit_code == 2
        assert ("is given twice" in result.stderr) != param.multiple, param.opts


def test_flags_may_be_repeated(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", [4])
    assert run("gc", str(tmp_path / "cache"), "--dry-run", "--dry-run", "-v", "-v").exit_code == 0


@pytest.mark.parametrize("second", ["max-steps", "max_steps"])
def test_a_file_of_options_neither(tmp_path: Path, second: str) -> None:
    (tmp_path / "options.yaml").write_text(f"max-steps: 4\n{second}: 8\n")
    result = run("train", "--config", str(tmp_path / "options.yaml"))
    assert result.exit_code == 2
    assert "max-steps is given twice" in result.stderr.replace("_", "-")


def test_keys_of_different_mappings_may_be_the_same() -> None:
    assert parse_yaml(b"a: {b: 1}\nc: {b: 2}\n") == {"a": {"b": 1}, "c": {"b": 2}}
    assert parse_yaml(b"x: &x {b: 1, c: 1}\ny: {<<: *x, b: 2}\n")["y"] == {"b": 2, "c": 1}
