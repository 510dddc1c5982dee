"""Print every text that a user can meet, so that the language can be read in one sitting.

    python tools/messages.py [FOLDER ...]

These are the string literals of two words or more: messages of errors, logs and results, headings,
help. `{…}` stands for a value. Docstrings count where they are help: those of the options classes.
Each comes with its file and line; without arguments of the whole package.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "kdcache"


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each message in a source file."""
    tree = ast.parse(path.read_text())
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                docstrings.add(id(node.body[0].value))  # type: ignore[attr-defined]
                if isinstance(node, ast.ClassDef) and node.name.endswith("Options"):
                    yield node.lineno, text
    inner = {id(part) for node in ast.walk(tree) for part in _parts(node)}
    for node in ast.walk(tree):
        if id(node) not in docstrings | inner and isinstance(node, (ast.Constant, ast.JoinedStr)):
            text = _text(node)
            if " " in text.strip():
                yield node.lineno, text


def _parts(node: ast.AST) -> list[ast.expr]:
    return node.values if isinstance(node, ast.JoinedStr) else []


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return "{…}"


def main() -> None:
    """Print the messages of the files below the given folders."""
    for folder in map(Path, sys.argv[1:] or [PACKAGE]):
        for path in sorted(folder.rglob("*.py")):
            for line, text in sorted(messages(path)):
                print(f"{path}:{line}: {' '.join(text.split())}")  # noqa: T201


if __name__ == "__main__":
    main()
