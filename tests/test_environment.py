"""The environment of a process of tests does not move while it is read."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

libc = ctypes.CDLL(None)


def _array() -> int | None:
    return ctypes.c_void_p.in_dll(libc, "environ").value


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(libc, "gnu_get_libc_version"), reason="not the GNU C library")
def test_new_names_do_not_move_what_other_threads_read(monkeypatch: pytest.MonkeyPatch) -> None:
    libc.getenv.restype = ctypes.c_char_p
    monkeypatch.setenv("KDCACHE_TEST_FIRST", "1")  # a library may have set one since the last test
    before = _array()
    names = [f"KDCACHE_TEST_{i}" for i in range(200)]
    for name in names:
        monkeypatch.setenv(name, f"value of {name}")
    monkeypatch.setenv(names[3], "another")
    monkeypatch.delenv(names[5])
    assert _array() == before
    assert libc.getenv(b"KDCACHE_TEST_199") == b"value of KDCACHE_TEST_199"
    assert libc.getenv(b"KDCACHE_TEST_3") == b"another"
    assert libc.getenv(b"KDCACHE_TEST_5") is None
    child = "import os; print(len([n for n in os.environ if n.startswith('KDCACHE_TEST_')]))"
    told = subprocess.run([sys.executable, "-c", child], capture_output=True, check=True)
    assert int(told.stdout) == 200  # the first one more, the fifth one less
    monkeypatch.undo()
    assert libc.getenv(b"KDCACHE_TEST_199") is None
    assert "KDCACHE_TEST_0" not in os.environ
    assert _array() == before
