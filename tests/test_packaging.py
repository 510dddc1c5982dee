"""What surrounds the code: package metadata, CI, and the cluster file."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from loaded import Program

import kdcache
from kdcache import errors
from kdcache.cli.commands import COMMANDS
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.options import EvaluateOptions, PlanOptions
from kdcache.commands.sweep import results
from kdcache.commands.sweep.results import RunScore, SweepResult
from kdcache.commands.train import callbacks
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import EXTRAS, UsageError, install_command, installed, require
from kdcache.storage.filesystem import FileSystem
from kdcache.teacher.files import TeacherFiles

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()

# Distributions whose import name is another.
IMPORTED_AS = {"ms-swift": "swift", "pyyaml": "yaml"}
# Imported without being declared, because a declared dependency cannot do without them.
CARRIED_BY = {
    "pydantic": "axolotl",
    "jinja2": "torch",
    "markupsafe": "jinja2",
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(distribution: str) -> set[str]:
    lines = metadata.requires(distribution) or []
    return {_normal(re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0]) for line in lines}


def _imports(folder: Path) -> set[str]:
    """Top-level names of the modules imported anywhere in a folder."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


def test_version_is_the_installed_one() -> None:
    assert f'version = "{kdcache.__version__}"' in PYPROJECT
    assert metadata.version("kdcache") == kdcache.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == kdcache.__version__


def test_command_is_installed_and_is_the_launchers() -> None:
    (entry,) = metadata.entry_points(group="console_scripts", name="kdcache")
    assert entry.value == "kdcache.cli.main:main"
    assert "from kdcache.cli.main import main" in (ROOT / "cli.py").read_text()


@pytest.mark.end_to_end
def test_launcher_of_a_checkout_runs() -> None:
    run = subprocess.run(
        [sys.executable, "cli.py", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert kdcache.__version__ in run.stdout


@pytest.mark.end_to_end
def test_public_names_stay_what_they_are() -> None:
    # A module of the same name must not take a function's place once it is imported, as it is here.
    script = """
import inspect, kdcache
for _ in range(3):
    for name in kdcache.__all__:
        thing = getattr(kdcache, name)
        assert not inspect.ismodule(thing), name
        assert callable(thing), name
"""
    program = Program("python", "-c", script)
    said = program.communicate()
    assert program.returncode == 0, said


def test_type_checkers_find_each_public_name_where_it_is() -> None:
    tree = ast.parse(Path(kdcache.__file__).with_suffix(".pyi").read_text())
    names = [(n, name) for n in tree.body if isinstance(n, ast.ImportFrom) for name in n.names]
    assert {name.asname: node.module for node, name in names} == kdcache._WHERE
    assert all(name.asname == name.name for _, name in names), "else strict checkers refuse it"


def test_every_dependency_says_why_it_is_there() -> None:
    block = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.M | re.S)
    assert block
    lines = block.group(1).splitlines()
    assert len(lines) > 5
    assert [line for line in lines if not re.fullmatch(r'\s+"[^"]+",\s+# \S.*', line)] == []


def test_what_is_imported_is_declared() -> None:
    declared = {IMPORTED_AS.get(n, n.replace("-", "_")) for n in _requirements("kdcache")}
    third_party = _imports(ROOT / "kdcache") - set(sys.stdlib_module_names) - {"kdcache"}
    missing = third_party - declared
    assert missing <= set(CARRIED_BY), "declare these in pyproject.toml"
    for name in missing:
        if CARRIED_BY[name] == "axolotl":  # in an environment of its own
            continue
        assert _normal(name) in _requirements(CARRIED_BY[name])


def test_the_lowest_versions_are_those_that_are_declared() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["lowest"]["steps"]
    assert steps[-1]["run"] == "PIP_CONSTRAINT=tests/lowest.txt make test-in-process"
    pinned = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests/lowest.txt").read_text(), re.M)
    declared = dict(re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', PYPROJECT))
    for name, version in pinned:
        assert version.startswith(declared[name]), name
    base = PYPROJECT.split("dependencies = [")[1].split("]\n")[0]
    for name in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=', base):
        assert name == "torch" or name in dict(pinned), f"{name} has no lowest version"


def test_types_and_licence_are_shipped() -> None:
    assert (ROOT / "kdcache" / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert 'license = "Apache-2.0"' in PYPROJECT


def test_ci_runs_the_script_that_runs_lint_and_tests() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert [s["run"] for s in job["steps"] if "run" in s] == ["bash .ci/run"]
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make lint$", script, re.M)
    assert re.search(r"^make test$", script, re.M)
    of_torch = [line for line in script.splitlines() if "TORCH" in line]
    assert of_torch == ["older=(VENV=.venv-cpu TORCH=torch==2.13.0)"], "else pip chooses a build"
    lowest = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)
    assert lowest
    assert lowest.group(1) == min(
        job["strategy"]["matrix"]["python"], key=lambda v: tuple(map(int, v.split(".")))
    )


def test_forms_of_issues_ask_for_something_and_have_each_field_once() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
    assert forms
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form["name"], path
        assert form["description"], path
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields), path
        assert any(field.get("validations", {}).get("required") for field in form["body"]), path


def test_classifiers_are_the_pythons_that_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    named = re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    assert named == workflow["jobs"]["test"]["strategy"]["matrix"]["python"]


def test_the_readme_of_a_release_has_no_relative_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = re.compile(r"\]\(([^)\s]+)\)")
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    before = links.findall((ROOT / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "release.py"), "https://host/a/b", "v1"]
    for _ in range(2):  # the second time changes nothing
        subprocess.run(command, check=True)
    after = links.findall(Path("README.md").read_text())
    relative = [link for link in before if not link.startswith(("http", "#"))]
    assert len(relative) > 10
    for link in relative:
        kind = "raw" if link.endswith((".svg", ".png")) else "blob"
        assert f"https://host/a/b/{kind}/v1/{link}" in after
        assert (ROOT / link.split("#")[0]).exists()
    assert len(after) == len(before)
    assert [link for link in after if not link.startswith(("http", "#"))] == []
    text = Path("pyproject.toml").read_text()
    assert text.count("[project.urls]") == 1
    assert 'Changelog = "https://host/a/b/blob/v1/CHANGELOG.md"' in text


@pytest.mark.end_to_end
def test_a_source_distribution_holds_what_its_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    copy = tmp_path / "checkout"
    for name in listed.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    build = 'from setuptools import build_meta as b; b.build_sdist("dist")'
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (archive,) = (copy / "dist").iterdir()
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {*listed.stdout.splitlines()} <= names
    made = {n for n in names - {*listed.stdout.splitlines()} if (copy / n).is_file()}
    assert all(".egg-info/" in name or name in ("PKG-INFO", "setup.cfg") for name in made)


def test_the_container_copies_what_is_there() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    let_in = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M)
    copied = [
        word for line in re.findall(r"^COPY (.+)$", lines, re.M) for word in line.split()[:-1]
    ]
    assert sorted(copied) == sorted(let_in)
    assert all((ROOT / name).exists() for name in copied)
    # `docker run --user` with any number: a home that it may write to, and a name.
    assert re.search(r"^ENV HOME=/cache .*USER=", lines, re.M)
    assert "chmod 1777 /work /cache" in lines
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", lines, re.M)
    assert all(re.search(rf"^{extra} = \[", PYPROJECT, re.M) for extra in extras.split(","))


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """The cluster file as `ray up` sees it: with Ray's defaults filled in."""
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import prepare_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    return config


def test_cluster_passes_rays_validation(cluster: dict[str, Any]) -> None:
    pytest.importorskip("jsonschema")
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    validate_config(cluster)
    with pytest.raises(ValidationError):
        validate_config({**cluster, "max_worker": 3})


def test_cluster_has_no_gpu_to_pay_for_when_idle(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    head = kinds[cluster["head_node_type"]]
    assert head["resources"]["GPU"] == 0
    workers = [kind for name, kind in kinds.items() if name != cluster["head_node_type"]]
    assert workers
    for kind in workers:
        assert kind["min_workers"] == 0
        assert kind["max_workers"] >= 1
        assert kind["resources"]["GPU"] >= 1
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert 0 < cluster["idle_timeout_minutes"] <= 15


def test_cluster_lets_nobody_in(cluster: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        starts = [c for c in cluster[f"{role}_start_ray_commands"] if "ray start" in c]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0]
    (head,) = [c for c in cluster["head_start_ray_commands"] if "ray start" in c]
    assert re.findall(r"--dashboard-host[= ](\S+)", head) == ["127.0.0.1"]
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_cluster_pins_ray_to_a_version_we_allow(cluster: dict[str, Any]) -> None:
    text = " ".join(cluster["setup_commands"])
    pinned = re.search(r"ray\[[\w,]+\]==([\d.]+)", text)
    lowest = re.search(r'"ray\[[\w,]+\]>=([\d.]+)"', PYPROJECT)
    assert pinned
    assert lowest

    def version(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    assert version(pinned.group(1)) >= version(lowest.group(1))


@pytest.mark.slow
def test_every_message_can_be_listed(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        '"""Not a message."""\n'
        'raise E(f"{x} is wrong. "\n    "Correct it.")\nlog("one %s", "word")\n'
    )
    listed = subprocess.run(
        [sys.executable, ROOT / "tools" / "messages.py", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.splitlines() == [
        f"{source}:2: {{…}} is wrong. Correct it.",
        f"{source}:4: one %s",
    ]


def test_the_readme_is_short_and_has_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert sorted(re.findall(r"^\| `kdcache (\w+)` \|", text, re.M)) == sorted(COMMANDS)


# Without an optional package


def _train(**asked: object) -> object:
    return TrainOptions(**{"cache": ("nowhere",), "student": "s", "out": "run", **asked})  # type: ignore[arg-type]


def _build(**asked: object) -> object:
    return BuildOptions(**{"teacher": ("t",), "corpus": ("c",), "out": "cache", **asked})  # type: ignore[arg-type]


def _trackers() -> None:
    if wrong := callbacks.wrong_trackers(["tensorboard"]):
        raise UsageError("\n".join(wrong))


ASKS: list[tuple[str, str, Callable[[], object]]] = [
    ("cluster", "--num-workers", lambda: _train(num_workers=2)),
    ("cluster", "--num-workers", lambda: _train(num_workers="1:4")),
    ("gcs", "gs://", lambda: FileSystem("gs://bucket/corpus")),
    ("lora", "--lora", lambda: _train(lora="r=4")),
    ("lora", "--lora", lambda: FinetuneOptions(model="m", corpus=("c",), out="o", lora="r=4")),
    ("plot", "--plot", lambda: _train(plot="a.png")),
    ("plot", "--plot", lambda: PlanOptions(teacher=("t",), corpus=("c",), plot="a.png")),
    ("plot", "--plot", lambda: EvaluateOptions(student=("s",), cache="c", plot="a.png")),
    ("s3", "s3://", lambda: FileSystem("s3://bucket/cache")),
    ("tensorboard", "tensorboard", _trackers),
    *(
        (
            name,
            f"integrations.{name}",
            partial(importlib.import_module, f"kdcache.integrations.{name}"),
        )
        for name in ("axolotl", "llamafactory", "swift", "trl")
    ),
    ("vllm", "--engine", lambda: _build(engine="vllm")),
]


def test_every_extra_is_known_and_asked_for_here() -> None:
    declared = re.findall(
        r"^([\w-]+) = \[", PYPROJECT.split("optional-dependencies]")[1].split("\n[")[0], re.M
    )
    for_users = {*declared} - {"cuda-tests", "docs", "dev"}
    assert {extra for extra, _, _ in ASKS} == set(EXTRAS) == for_users
    (listed,) = re.findall(r"\(extras: (.*?)\)", (ROOT / "README.md").read_text())
    assert set(re.findall(r"`(\w+)`", listed)) == set(EXTRAS)


@pytest.mark.parametrize(("extra", "what", "ask"), ASKS)
def test_what_is_missing_is_named_before_anything_starts(
    extra: str, what: str, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    monkeypatch.setattr(callbacks, "get_available_reporting_integrations", list)
    with pytest.raises(UsageError) as refused:
        ask()
    assert what in str(refused.value)
    assert install_command(extra) in str(refused.value)


@pytest.mark.parametrize("extra", ["cluster", "lora", "plot", "vllm"])
def test_what_is_there_is_no_news(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "installed", lambda extra: True)
    for _, _, ask in (one for one in ASKS if one[0] == extra):
        ask()


def test_several_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("cluster", "lora", "plot"):
        monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    with pytest.raises(UsageError) as refused:
        _train(num_workers=2, lora="r=4", plot="a.png")
    *lines, command = str(refused.value).splitlines()
    assert [line.split()[0] for line in lines] == ["--lora", "--plot", "--num-workers"]
    assert command.endswith(shlex.quote(f"{ROOT}[lora,plot,cluster]"))


def test_an_adapter_says_so_before_its_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="an adapter, needs the extra `lora`"):
        TeacherFiles.find(str(tmp_path))


def test_a_checkout_asks_for_its_own_extras() -> None:
    words = shlex.split(install_command("plot", "s3"))
    assert words == [sys.executable, "-m", "pip", "install", "-e", f"{ROOT}[plot,s3]"]


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_copy_asks_for_what_its_extra_brings(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "kdcache" / "errors.py"))
    (declared,) = re.findall(rf'^{extra} = \["(.*?)"\]', PYPROJECT, re.M)
    *_, install, wanted = shlex.split(install_command(extra))
    assert install == "install"
    assert re.split("[>=]+", wanted)[-1] == re.split("[>=]+", declared)[-1]
    assert {*re.findall(r"\w+", wanted)} == {*re.findall(r"\w+", declared)}


def test_no_index_is_asked_for_kdcache() -> None:
    assert metadata.requires("kdcache")
    for name in ("README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))):
        assert not re.search(r"install '?kdcache\[", (ROOT / name).read_text()), name


def test_an_environment_without_pip_is_one_of_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    words = shlex.split(install_command("plot"))
    assert words[:5] == ["uv", "pip", "install", "--python", sys.executable]


def test_a_sweep_without_matplotlib_keeps_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = RunScore("a", "runs/a", {"alpha": "0.1"}, None, {"hard_loss": 1.0}, 10, 2, None, 0.5)
    result = SweepResult.of(tmp_path, [run], made=1, combinations=1, evaluated=False)
    result.write(tmp_path)
    results.plot_sweep(tmp_path / "results.png", result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]
    assert install_command("plot") in caplog.text


def test_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed("plot")
    require({"plot": "--plot"})
    monkeypatch.setitem(EXTRAS, "plot", "no_such_module")
    assert not installed("plot")
