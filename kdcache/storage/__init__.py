"""Storage of a cache: a folder, local or behind any fsspec URL, with the few methods a cache needs.

Guarantee: a name appears only with its whole content. The listing of the folder is therefore the
only state: what is listed is committed.
"""

from __future__ import annotations

from kdcache.humanize import redact
from kdcache.storage.base import LocalStorage, Share, Storage, is_remote, sha256_file

__all__ = ["LocalStorage", "Share", "Storage", "is_remote", "open_storage", "redact", "sha256_file"]


def open_storage(url: str) -> Storage:
    """The storage behind a local path or an fsspec URL such as `s3://bucket/cache`.

    Raises:
        UsageError: a protocol that is unknown, or credentials in an address that takes none.
    """
    if is_remote(url):
        from kdcache.storage.remote import RemoteStorage

        return RemoteStorage(url)
    return LocalStorage(url.removeprefix("file://"))
