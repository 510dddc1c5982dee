"""Hooks of MkDocs: the site has more pages than docs/ has files.

The documents are written to be read in a checkout, so their links name its files. Here README,
CONTRIBUTING, SECURITY, CHANGELOG and the benchmarks become pages, and each link to a file leads to
its page: an example to its place on the page of examples, any other file to a copy as plain text.
The references of commands and Python are made from the code.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "examples/sst2/README.md": "sst2.md",
    "examples/rounds/README.md": "rounds.md",
    "examples/recovery/README.md": "recovery_example.md",
}
_SHIM = "https://unpkg.com/iframe-worker/shim"
_WORKER = "files/file_worker.js"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that docs/ does not have, and the files that documents link to."""
    from mkdocs.structure.files import File

    for name, text in added().items():
        files.append(File.generated(config, name, content=text))
    return files


def added() -> dict[str, str]:
    """Name and text of each page or file of the site that is not in docs/."""
    made = {page: (ROOT / path).read_text() for path, page in PAGES.items()}
    made |= {"commands.md": _commands(), "python.md": _python(), "examples.md": _examples()}
    made |= {_page(path): _notebook(ROOT / path) for path in _notebooks()}
    copies = {target for path in _documents() for target in _copied(path)}
    made |= {_WORKER: (ROOT / "tools" / "file_worker.js").read_text()}
    made |= {_copy(path): (ROOT / path).read_text() for path in copies}
    return made


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of a document lead to pages of the site."""
    name = page.file.src_uri
    sources = {made: path for path, made in PAGES.items()}
    sources |= {_page(path): path for path in _notebooks()}
    folder = Path(sources.get(name, f"docs/{name}")).parent
    return _LINK.sub(lambda link: _target(folder, link), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Let the search of pages that are read from disk load nothing from elsewhere."""
    return output.replace(_SHIM, "/".join([".."] * page.url.count("/") + [_WORKER]))


def _target(folder: Path, link: re.Match[str]) -> str:
    path = os.path.normpath(folder / link["path"])
    anchor = link["anchor"] or ""
    if path in PAGES or path in _notebooks():
        return PAGES.get(path, _page(path)) + anchor
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + anchor
    if path.startswith("examples") or path == "cluster.yaml":
        return "examples.md" + (f"#{_slug(path)}" if (ROOT / path).is_file() else "")
    return _copy(path) if (ROOT / path).is_file() else link[0]


def _documents() -> list[str]:
    return [*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def _copied(document: str) -> list[str]:
    """Files that a document links to and that are no page."""
    folder = Path(document).parent
    found = {os.path.normpath(folder / link["path"]) for link in _links(document)}
    others = (p for p in found if not p.startswith(("docs/", "examples")) and p != "cluster.yaml")
    return [path for path in others if path not in PAGES and (ROOT / path).is_file()]


def _links(document: str) -> list[re.Match[str]]:
    return list(_LINK.finditer((ROOT / document).read_text()))


def _copy(path: str) -> str:
    return f"files/{path}.txt"


def _slug(path: str) -> str:
    return re.sub(r"\W+", "-", path)


def _notebooks() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("examples/**/*.ipynb"))]


def _page(notebook: str) -> str:
    return f"notebook_{Path(notebook).stem}.md"


def _notebook(path: Path) -> str:
    """A notebook's text and code as a page, with a link to the file."""
    name = path.relative_to(ROOT).as_posix()
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts.insert(1, f"*This page is the notebook `{name}` of the repository.*")
    return "\n\n".join(parts) + "\n"


def _examples() -> str:
    """Every file of examples/ that is no page, and the cluster's description, as one page."""
    kinds = {".sh": "sh", ".py": "python", ".yaml": "yaml", ".json": "json"}
    paths = [ROOT / "cluster.yaml", *sorted(ROOT.glob("examples/**/*"))]
    parts = ["# Example files"]
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        language = kinds.get(path.suffix)
        if language is None:
            continue
        parts.append(f"## {name} {{ #{_slug(name)} }}\n\n````{language}\n{path.read_text()}````")
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    """The help of every command."""
    from kdcache.cli.main import cli

    width: dict[str, Any] = {"terminal_width": 84, "max_content_width": 84}
    top = click.Context(cli, info_name="kdcache", **width)
    parts = ["# Commands", f"```text\n{cli.get_help(top)}\n```"]
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        assert command is not None, "it was listed"
        context = click.Context(command, parent=top, info_name=name, **width)
        parts.append(f"## kdcache {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"


def _python() -> str:
    """The public names of the package, each from its docstring."""
    import kdcache

    commands = {path.name for path in (ROOT / "kdcache/commands").iterdir()}
    kinds: dict[str, list[str]] = {
        "Commands": [n for n in kdcache.__all__ if n in commands],
        "Their options": [n for n in kdcache.__all__ if n.endswith("Options")],
        "Their results": [n for n in kdcache.__all__ if n.endswith("Result")],
        "Errors": [n for n in kdcache.__all__ if n.endswith("Error")],
    }
    listed = {name for names in kinds.values() for name in names}
    others = [name for name in kdcache.__all__ if name not in listed]
    parts = ["# Python", "Every name is imported from `kdcache`."]
    for kind, names in {"Caches, streams, losses, students": others, **kinds}.items():
        parts.append(f"## {kind}")
        parts += [f"::: {kdcache._WHERE[name]}.{name}" for name in names]
    return "\n\n".join(parts) + "\n"
