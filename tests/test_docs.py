"""What README.md, CONTRIBUTING.md and docs/ show holds: code runs as pasted, links, paths and commands are there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gs_algos
import gs_kernels
from gs_algos.pipeline.recipe import read_recipe
from tests.helpers import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: nothing of the pages is about the interpreter")

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FILE = re.compile(r"# (\S+/\S+\.py)\n")  # the first line of a block that is a file of its own


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page, also those inside of lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def code_of(page: Path) -> str:
    return "\n".join(block for block in blocks(page, "python") if not FILE.match(block))


def commands_in(page: Path, start: str, name: str) -> list[list[str]]:
    """Name and arguments of each command that begins so, in fenced blocks and between backticks."""
    text = page.read_text()
    places = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    places += re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
    found = [re.search(rf"{start} ({name})(?: (.*))?$", " ".join(place.partition(" #")[0].split())) for place in places]
    return [[match[1], *(match[2] or "").split()] for match in found if match]


def options_in(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]


def site() -> tuple[dict[str, Any], ModuleType]:
    """mkdocs.yml, and the hooks beside the pages."""
    yaml = pytest.importorskip("yaml", reason="PyYAML (extra cli) is not installed")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text()), hooks


@pytest.mark.parametrize(
    "page", [page for page in PAGES if code_of(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), str(page), "exec"), {"__name__": "pasted"})


@every_page
def test_the_links_of_a_page_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@every_page
def test_the_paths_that_a_page_names_are_there(page: Path):
    names = re.findall(
        r"`((?:gs_kernels|gs_algos|bench|tests|docs|examples|\.ci|\.github)/[\w./-]*)`", page.read_text()
    )
    assert [name for name in names if not (ROOT / name).exists()] == []


@every_page
def test_the_recipes_of_a_page_are_read(page: Path, tmp_path: Path):
    for block in blocks(page, "toml"):
        if "[[stage]]" in block:
            (tmp_path / "recipe.toml").write_text(block)
            assert read_recipe(tmp_path / "recipe.toml").stage


@every_page
def test_the_commands_of_a_page_exist(page: Path):
    found = commands_in(page, "golden-stick", "[a-z]+")
    if not found:
        return
    typer = pytest.importorskip("typer", reason="typer (extra cli) is not installed")
    from gs_algos.cli.app import app

    commands = typer.main.get_command(app).commands
    for name, *words in found:
        assert name in commands
        known = {text for option in commands[name].params for text in [*option.opts, *option.secondary_opts]}
        others = commands[name].context_settings.get("ignore_unknown_options", False)  # they go to an engine
        assert others or set(options_in(words)) <= known, (name, words)


def test_every_command_is_on_the_page_of_commands():
    typer = pytest.importorskip("typer", reason="typer (extra cli) is not installed")
    from gs_algos.cli.app import app

    listed = {name for name, *_ in commands_in(ROOT / "docs" / "commands.md", "golden-stick", "[a-z]+")}
    assert listed == set(typer.main.get_command(app).commands)


@every_page
def test_the_modules_that_a_page_runs_know_its_options(page: Path, capsys: pytest.CaptureFixture[str]):
    for name, *words in commands_in(page, "python -m", r"(?:bench|gs_)[\w.]+"):
        module = importlib.import_module(name)
        module = importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
        assert stop.value.code == 0 and set(options_in(words)) <= set(known), (name, words)


@every_page
def test_the_extras_that_a_page_installs_exist(page: Path):
    asked = re.findall(r"(?:\.|golden-stick-triton)\[([a-z,]+)\]", page.read_text())
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("dependencies]")[2], re.M)
    assert {extra for names in asked for extra in names.split(",")} <= set(extras)


def test_every_page_is_in_the_navigation():
    config, hooks = site()
    listed = re.findall(r"[\w./-]+\.md", str(config["nav"]))
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(listed) == sorted([*pages, *hooks.PAGES.values()])
    assert [name for name in hooks.OUTSIDE if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("package", [gs_algos, gs_kernels], ids=lambda package: package.__name__)
def test_every_public_name_has_its_place_in_the_api_pages(package: ModuleType):
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(rf"^::: {package.__name__}\.(?:[\w.]+\.)?(\w+)$", text, re.M)
    assert sorted(shown) == sorted(name for name in package.__all__ if not name.startswith("__"))


def test_the_changelog_speaks_of_this_version():
    assert re.search(rf"\b{re.escape(gs_algos.__version__)}\b", (ROOT / "CHANGELOG.md").read_text())


def test_the_site_is_built_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="mkdocs (extra docs) is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
