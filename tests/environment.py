"""Environment variables that can be set while other threads read them.

`setenv` of the GNU C library before 2.41 frees the array of a process's variables when a new name
makes it grow. A thread of Ray or of a tokenizer that is inside `getenv` at that moment, which the
GIL does not hinder, reads freed memory: once in several whole runs of the suite a worker of pytest
died of it. Tests set variables with Ray running; commands set theirs before they start anything.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

ROOM = 4096
"""Variables that the array has room for."""


def never_move_the_environment() -> None:
    """From here on `os.environ` puts new names into an array of the C library that is never freed.

    Does nothing where the C library is another one than GNU's.
    """
    try:
        libc = ctypes.CDLL(None)
        array = ctypes.c_void_p.in_dll(libc, "environ")
        libc.gnu_get_libc_version  # noqa: B018  (raises where there is none)
    except (OSError, TypeError, AttributeError, ValueError):
        return
    libc.getenv.restype = ctypes.c_void_p
    ours = (ctypes.c_void_p * (ROOM + 1))()
    kept: list[ctypes.Array[ctypes.c_char]] = []  # entries of the array, never freed either
    replace: Callable[[bytes, bytes], None] = os.putenv

    def put(name: str | bytes, value: str | bytes) -> None:
        name, value = os.fsencode(name), os.fsencode(value)
        if libc.getenv(name) is not None:  # an entry is exchanged, the array stays
            replace(name, value)
            return
        if array.value != ctypes.addressof(ours):
            theirs = ctypes.cast(array.value or 0, ctypes.POINTER(ctypes.c_void_p))
            count = 0
            while array.value and theirs[count]:
                ours[count] = theirs[count]
                count += 1
            ours[count] = None
            array.value = ctypes.addressof(ours)
        count = next(i for i in range(ROOM) if not ours[i])
        kept.append(ctypes.create_string_buffer(name + b"=" + value))
        ours[count + 1] = None
        ours[count] = ctypes.addressof(kept[-1])

    os.putenv = put
