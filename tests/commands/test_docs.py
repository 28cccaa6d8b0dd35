"""The documentation, run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import warm_ranks
from oracles import FIXTURES, ROOT

import ckpt
from ckpt.cli.main import commands
from ckpt.cli.options import SourcePath

if TYPE_CHECKING:
    from faults.forks import Forks

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
INNER = [*sorted((ROOT / "docs").glob("*/*.md")), FIXTURES / "README.md"]
LANGUAGES = {  # sh and python are run here, torchrun and bash by the tests of what they show
    *("sh", "python", "python torchrun", "python front-end", "bash"),
    *("sh no-run", "python no-run", "text", "yaml"),
}
FOLDERS = "ckpt|converters|tests|scripts|docs|fixtures"


def called(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S))


def runs(page: Path) -> bool:
    """Whether a page has blocks that run here."""
    return "\nckpt " in f"\n{blocks(page, 'sh')}" or bool(blocks(page, "python"))


@pytest.mark.oracle  # they import what they show: torch, transformers
@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=called)
def test_every_code_block_of_a_page_runs(page: Path, tmp_path: Path, forks: Forks) -> None:
    """In forks: of ``ckpt`` itself, and of a process that has imported torch and transformers."""
    shutil.copytree(FIXTURES / "trainer-zero2/checkpoint-2", tmp_path / "out/checkpoint-1")
    for line in blocks(page, "sh").splitlines():
        if line.startswith("ckpt "):
            assert not set("|&;<>()$`\\*?~") & set(line.partition(" #")[0]), "it needs a shell"
            words = shlex.split(line, comments=True)
            done = forks.run(words[1:], tmp_path, folder=tmp_path)
            assert done.status == 0, done.said

    if not blocks(page, "python"):
        return

    script = tmp_path / "blocks.py"
    script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{blocks(page, 'python')}")
    ended = warm_ranks.run(str(script), [], ranks=1, limit=300, environment={}, elastic=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_the_outputs_in_the_readme_are_real(tmp_path: Path) -> None:
    source = FIXTURES / "trainer-zero2/checkpoint-2"
    # as cp -r, which keeps no times
    shutil.copytree(source, tmp_path / "out/checkpoint-1", copy_function=shutil.copy)
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r"^```sh\nckpt ([^\n]*)\n```\n\n```text\n(.*?)^```$", text, re.M | re.S)
    assert len(shown) == 4

    for arguments, output in shown:
        command = [sys.executable, "-m", "ckpt", *arguments.split()]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        run = {"cwd": tmp_path, "check": True, "timeout": 300, "env": environment}
        real = subprocess.run(command, capture_output=True, text=True, **run).stdout
        lines = output.replace("/home/you", str(tmp_path)).splitlines()
        for line, real_line in zip(lines, real.splitlines(), strict=True):
            pattern = re.escape(line).replace(re.escape("..."), ".*")
            pattern = re.sub(r"\d+[smhd](?:\\ )+", r"\\d+[smhd] +", pattern)  # an age
            assert re.fullmatch(pattern, real_line), line


def test_every_command_and_option_is_in_the_docs() -> None:
    written = [page for page in PAGES if page.name != "cli.md"]  # which is made from the program
    text = "\n".join(page.read_text() for page in written)
    for name in commands():
        assert f"ckpt {name}" in text
    for option in commands()["to-fp32"].params:
        for flag in option.opts:
            if flag.startswith("--") and flag not in ("--help", "--output"):
                assert flag in text, flag


def test_the_reference_of_the_command_line_is_up_to_date() -> None:
    command = [sys.executable, "scripts/make_cli_reference.py", "--check"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/index.md"
    pages = {page.name for page in index.parent.glob("*.md")} - {index.name}
    assert pages <= set(re.findall(r"\]\(([\w.-]+)", index.read_text()))


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "docs/decisions").glob("*.md"))], ids=called
)
def test_lines_are_short_and_blocks_have_a_known_language(page: Path) -> None:
    text = page.read_text()
    fences = re.findall(r"^ *```(.*)$", text, re.M)
    assert {*fences[::2]} <= LANGUAGES and {*fences[1::2]} <= {""}

    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    assert re.search(r"(?:\A|\n)\n    \S", prose) is None, "an indented block"
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "["))]
    assert [line for line in lines if len(line) > 120] == []


def test_links_lead_somewhere() -> None:
    pages = [*PAGES, *INNER]
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not target.startswith("http")
    ]
    assert len(pages) > 50 and len(links) > 200
    for page, target in links:
        path, _, anchor = target.partition("#")
        goal = page.parent / path if path else page
        assert goal.exists(), (page, target)
        assert not anchor or anchor in anchors(goal), (page, target)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_paths_that_are_named_exist(page: Path) -> None:
    for path in re.findall(rf"`((?:{FOLDERS})/[a-z0-9_./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_guide_names_tests_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("| tests/*/test_NAME.py |\n")[2].partition("\n\n")[0]
    columns = [line.split("|")[2] for line in table.splitlines()]
    names = re.findall(r"`(\w+)`", "".join(columns))
    assert len(names) > 50
    for name in names:
        assert any((ROOT / "tests").rglob(f"test_{name}.py")), name


def test_every_room_of_the_tests_is_described() -> None:
    text = (ROOT / "tests/README.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == rooms


def test_the_guide_names_the_commands_that_read_urls() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (listed,) = re.findall(r"([^.]*)and `ckpt\.open` then read from\s+its URLs", text)
    readers = {
        name
        for name, command in commands().items()
        if any(isinstance(parameter.type, SourcePath) for parameter in command.params)
    }
    assert set(re.findall(r"`([\w-]+)`", listed)) == readers


@pytest.mark.oracle  # it imports the trainers
def test_what_is_public_is_there() -> None:
    names = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/api.md").read_text(), re.M)
    assert {f"ckpt.{name}" for name in ckpt.__all__} <= set(names)
    for name in names:
        assert callable(resolved(name)) or name == "ckpt.__version__", name


def resolved(name: str) -> object:
    """What a dotted name stands for: each part an attribute of the one before, or a module."""
    first, *parts = name.split(".")
    value: object = import_module(first)
    for count, part in enumerate(parts, 2):
        if not hasattr(value, part):
            import_module(".".join(name.split(".")[:count]))
        value = getattr(value, part)
    return value


def test_the_version_is_the_same_everywhere() -> None:
    released = re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert released and cited
    assert released[1] == cited[1] == ckpt.__version__


def test_the_differences_name_fixtures_and_tests_that_exist() -> None:
    text = (ROOT / "docs/deepspeed-differences.md").read_text()
    kinds = r"zero\d|s\d|o0_|w_|b16|moe|tp\d?_|mpu_|p3dm?_|sp\d_|aeptp_|pipeline-zero"
    rooms = (".", "corpus", "parallel", "pipelines-and-experts")
    for name in re.findall(rf"`((?:{kinds})[\w.*-]*)`", text):
        found = [path for room in rooms for path in (FIXTURES / room).glob(name)]
        assert found, name
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert any((ROOT / "tests").rglob(name)), name
