"""The site's navigation and its links; building it is `make docs`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "tools/site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation(site: ModuleType) -> None:
    listed = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    made = [name for name in site.added() if name.endswith(".md")]
    assert sorted(listed) == sorted([*made, *(p.name for p in (ROOT / "docs").glob("*.md"))])


def test_every_link_leads_to_a_page_or_file_of_the_site(site: ModuleType) -> None:
    added = site.added()
    here = {path.name for path in (ROOT / "docs").iterdir()} | set(added)
    texts = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    texts |= {page: (ROOT / path).read_text() for path, page in site.PAGES.items()}
    for name, text in texts.items():
        page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
        links = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", site.on_page_markdown(text, page))
        assert set(links) <= here, name
    anchors = set(re.findall(r"\{ #(\S+) \}", added["examples.md"]))
    named = re.findall(r"examples\.md#(\S+)\)", "".join(texts.values()))
    assert set(named) <= anchors
    assert "cluster-yaml" in anchors


def test_the_references_name_every_command_and_every_public_name(site: ModuleType) -> None:
    import kdcache
    from kdcache.cli.main import cli

    added = site.added()
    commands = set(re.findall(r"^## kdcache (\S+)$", added["commands.md"], re.M))
    assert commands == set(cli.list_commands(None))  # type: ignore[arg-type]
    named = re.findall(r"^::: \S+\.(\w+)$", added["python.md"], re.M)
    assert sorted(named) == kdcache.__all__


def test_the_search_of_pages_from_disk_loads_nothing_from_elsewhere(site: ModuleType) -> None:
    page = SimpleNamespace(url="deep/page.html")
    shown = site.on_post_page('<script src="https://unpkg.com/iframe-worker/shim">', page=page)
    assert shown == '<script src="../files/file_worker.js">'
    assert "window.Worker" in site.added()["files/file_worker.js"]
