"""The rules of the tree: who may import what, and what is defined once."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kdcache"
LAYERS = (
    *({"cli"}, {"commands", "integrations"}, {"student"}, {"stream"}, {"cache", "teacher"}),
    *({"rows"}, {"corpus", "loss", "align"}, {"storage", "targets"}),
)
RANK = {folder: len(LAYERS) - i for i, layer in enumerate(LAYERS) for folder in layer}  # ground: 0
GROUND = {
    "domains",
    "errors",
    "lora",
    "models",
    "tasks",
    "options",
    "pretrained",
    "row_groups",
    "cluster",
    "files",
    "plots",
    "humanize",
    "metrics",
}
ONLY = {  # a library, and where alone it may be imported
    "click": r"cli/.*",
    "rich": r"cli/.*",
    "h5py": r"cache/(shard|hdf5)",
    "ray": r"cluster|commands/.*/on_ray|commands/sweep/sweep",
    "fsspec": r"storage/filesystem",
    "peft": r"(student|teacher)/adapter",
    "axolotl": r"integrations/axolotl",
    "llamafactory": r"integrations/llamafactory",
    "swift": r"integrations/swift",
    "trl": r"integrations/trl",
}
EXCEPTIONS: dict[str, set[str]] = {}
PURE = {
    "kdcache.tasks",
    "kdcache.errors",
}  # what targets and loss may import, beside these
LIGHT = {"numpy", "torch", *sys.stdlib_module_names}
ONCE = (  # one definition of each
    r"^IGNORE\b.*=",
    r"^\w+\b.*= \"causal-lm\"",
    r"^\w+\b.*= \"sequence-classification\"",
    r"^def positions\(",
    r"^def padded\(",
)

# Each module by its name in the package, "stream/reader"; a folder's __init__ is "stream".
SOURCES = {
    p.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__"): p.read_text()
    for p in PACKAGE.rglob("*.py")
}


def imports(source: str) -> set[str]:
    """Modules that a source imports anywhere in it, functions and TYPE_CHECKING included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            under = (f"{node.module}.{alias.name}" for alias in node.names)
            names = [name for name in under if name[8:].replace(".", "/") in SOURCES]
            found |= set(names) or {node.module}
    return found


@cache  # parsed by the one process that has these tests, not by each that collects them
def imported() -> dict[str, set[str]]:
    """What each module imports."""
    return {name: imports(source) for name, source in SOURCES.items()}


@cache
def inside() -> dict[str, set[str]]:
    """Those of the package."""
    return {
        name: {i[8:].replace(".", "/") for i in found if i.startswith("kdcache.")} - {name}
        for name, found in imported().items()
    }


def folder(name: str) -> str:
    return name.split("/")[0]


def test_imports_go_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, found in inside().items()
        if name not in ("__init__", "__main__")
        for other in found
        if folder(other) != folder(name)
        and RANK.get(folder(other), 0) >= RANK.get(folder(name), 0)
        and not {folder(other), folder(name)} <= GROUND
    ]
    assert wrong == []


def test_only_the_outermost_import_commands_and_the_command_line() -> None:
    allowed = {"commands": ("cli", "commands", "__init__"), "cli": ("cli", "__main__", "__init__")}
    wrong = [
        f"{name} imports {other}"
        for name, found in inside().items()
        for other in found
        if folder(other) in allowed and folder(name) not in allowed[folder(other)]
    ]
    assert wrong == []


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_imported_where_it_is_at_home(library: str) -> None:
    users = {n for n, found in imported().items() if any(i.split(".")[0] == library for i in found)}
    assert [name for name in users if not re.fullmatch(ONLY[library], name)] == []
    assert users, "a rule about a library that nothing imports"


def test_targets_and_losses_know_numpy_and_torch_alone() -> None:
    for name, found in imported().items():
        if folder(name) in ("targets", "loss"):
            foreign = {i for i in found if i.split(".")[0] not in LIGHT and i not in PURE}
            own = {i for i in foreign if i.startswith(("kdcache.targets", "kdcache.loss"))}
            assert foreign == own, name


def test_no_import_goes_in_a_circle() -> None:
    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in inside().get(name, set()) - EXCEPTIONS.get(name, set()):
                follow(other, (*path, name))
            done.add(name)

    done: set[str] = set()
    for name in inside():
        if name != "__init__":
            follow(name, ())


def test_no_loose_module_but_those_of_the_ground() -> None:
    loose = {name for name in SOURCES if "/" not in name and not (PACKAGE / name).is_dir()}
    assert loose <= GROUND | {"__init__", "__main__"}
    assert {folder(n) for n in SOURCES if (PACKAGE / folder(n)).is_dir()} == set(RANK)


@pytest.mark.parametrize("definition", ONCE)
def test_one_definition(definition: str) -> None:
    found = [n for n, s in SOURCES.items() for _ in re.finditer(definition, s, re.MULTILINE)]
    assert len(found) == 1, f"{definition} in {found}"
