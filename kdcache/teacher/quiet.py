"""Silences transformers' own progress bars and advice."""

from __future__ import annotations


class quiet_transformers:  # noqa: N801 - used like a function
    """Context without transformers' progress bars and loading reports."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf

        self._bars, self._level = hf.is_progress_bar_enabled(), hf.get_verbosity()
        hf.disable_progress_bar()
        hf.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf

        if self._bars:
            hf.enable_progress_bar()
        hf.set_verbosity(self._level)
