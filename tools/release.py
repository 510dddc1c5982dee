"""Prepares a checkout for PyPI, which shows the README without the files beside it.

    python tools/release.py https://github.com/OWNER/kdcache REF

Links of README.md that lead to files of the checkout become links to that repository, those of
images to its raw files, and the project's addresses are added to pyproject.toml. The release
workflow runs it before `python -m build`; nothing of it is committed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")


def absolute(readme: str, repository: str, ref: str) -> str:
    """The README with absolute links."""

    def link(found: re.Match[str]) -> str:
        image, text, path = found.groups()
        kind = "raw" if image else "blob"
        return f"{image}[{_LINK.sub(link, text)}]({repository}/{kind}/{ref}/{path})"

    return _LINK.sub(link, readme)


def urls(repository: str, ref: str) -> str:
    """The section of pyproject.toml with the project's addresses."""
    pages = {
        "Source": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/{ref}/CHANGELOG.md",
        "Documentation": f"{repository}/tree/{ref}/docs",
    }
    return "[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in pages.items())


def main(repository: str, ref: str) -> None:
    """Change the checkout that the process is in."""
    readme, project = Path("README.md"), Path("pyproject.toml")
    readme.write_text(absolute(readme.read_text(), repository, ref))
    text = project.read_text()
    if "[project.urls]" not in text:
        mark = "[project.scripts]\n"
        project.write_text(text.replace(mark, f"{urls(repository, ref)}\n{mark}", 1))


if __name__ == "__main__":
    main(*sys.argv[1:3])
