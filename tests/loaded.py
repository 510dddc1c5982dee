"""Processes of tests that cost milliseconds instead of seconds.

They are forks of a server that has imported torch, transformers and what such tests run. There is
one such server a process of pytest, and it begins with the first of them: its list of modules is
here and nowhere else.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "kdcache.commands.train.process_group",
        "kdcache.commands.export",
        "kdcache.commands.import_.import_",
        "s3fs",
    ]
)
