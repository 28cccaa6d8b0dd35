"""The documentation, run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import FIXTURES, ROOT

from ckpt.cli import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_block_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "trainer-zero2/checkpoint-2", tmp_path / "out/checkpoint-1")
    commands = [line for line in blocks(page, "sh").splitlines() if line.startswith("ckpt ")]
    shell = 'ckpt() { "$PYTHON" -m ckpt "$@"; }\nset -eu\n' + "\n".join(commands)
    environment = {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    run = {"cwd": tmp_path, "check": True, "timeout": 300, "env": environment}
    subprocess.run(["bash", "-c", shell], **run)
    subprocess.run([sys.executable, "-c", blocks(page, "python")], **run)


def test_every_command_and_option_is_in_the_docs() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    for name in cli.commands:
        assert f"ckpt {name}" in text
    for option in cli.commands["to-fp32"].params:
        for flag in option.opts:
            if flag.startswith("--") and flag not in ("--help", "--output"):
                assert flag in text, flag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_differences_name_fixtures_and_tests_that_exist() -> None:
    text = (ROOT / "docs/deepspeed-differences.md").read_text()
    for name in re.findall(r"`((?:zero\d|s\d|o0_|w_|b16|moe|tp_)[\w.*-]*)`", text):
        found = [*FIXTURES.glob(name), *(FIXTURES / "corpus").glob(name)]
        assert found, name
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert (ROOT / "tests" / name).is_file(), name
