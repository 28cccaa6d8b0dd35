"""Messages name options to whoever types commands, and arguments to whoever calls functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracles import FIXTURES, ROOT, run
from syntax_trees import nodes, tree

import ckpt
from ckpt.cli.main import commands
from ckpt.weights.arguments import naming_arguments
from converters import options
from converters.errors import CheckpointError
from converters.options import MERGE, NAMES, NO_VERIFY, OUTPUT, RENAME, TAG, WEIGHTS, Option

OPTIONS = [value for value in vars(options).values() if isinstance(value, Option)]
MODULES = [
    path
    for room in ("ckpt", "converters")
    for path in sorted((ROOT / room).rglob("*.py"))
    if ROOT / "ckpt/cli" not in path.parents
]
# Modules whose strings have options that are none of a message of ours, and whose these are.
OTHERS = {
    "ckpt/distributed/launchers.py": "torchrun and srun",
    "ckpt/hub/background.py": "a command line that is run",
    "ckpt/rewrite/reshard_command.py": "a command line that is shown",
    "ckpt/zero_to_fp32.py": "the parser of DeepSpeed's script",
    "converters/options.py": "the options themselves",
    "converters/storage/url_path.py": "aws and gcloud",
}
_OPTION = re.compile(r"(?<![\w-])(--[a-z]|-o\b)")
# a command that is named with all of its options
_COMMAND = re.compile(r"(?<![\w/.-])ckpt (?:[a-z]+-)?[a-z0-9]+(?: [^\s;,:()]+)*? --[^;,:()]*")


def test_one_message_is_told_to_everyone_in_their_words() -> None:
    def text() -> str:
        return f"choose one with {TAG}, {OUTPUT('DIR')}, {MERGE}, {WEIGHTS('16bit')} or {NO_VERIFY}"

    assert text() == (
        "choose one with ckpt to-fp32 --tag, ckpt to-fp32 -o DIR, ckpt to-fp32 --merge, "
        "ckpt to-fp32 --weights 16bit or ckpt to-fp32 --no-verify"
    )
    with options.using(options.of_commands):
        assert text() == "choose one with --tag, -o DIR, --merge, --weights 16bit or --no-verify"
        with naming_arguments("tag="):  # the outermost is the user's
            assert str(TAG) == "--tag"
    with naming_arguments("tag=", "output=", "merge=True", "weights=", "verify=False"):
        assert text() == (
            'choose one with tag=, output=DIR, merge=True, weights="16bit" or verify=False'
        )
        assert TAG("a/b") == 'tag="a/b"'
        with options.using(options.of_commands, overrides=True):
            assert str(TAG) == "--tag"


def test_an_argument_may_have_another_name_or_its_value() -> None:
    with naming_arguments("rename=", names="Naming(as_stored=True)"):
        assert NAMES("as-stored") == "Naming(as_stored=True)"
        assert RENAME("OLD=NEW") == 'rename="OLD=NEW"'


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_is_one_of_its_command(option: Option) -> None:
    spellings = {
        text
        for param in commands()[option.command].params
        for text in (*param.opts, *param.secondary_opts)
    }
    assert option.flag in spellings


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module but for its docstrings, each value in them as "x"."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    passed_over = {
        id(node.body[0].value)
        for node in (tree(path), *nodes(path))
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in nodes(path):
        if isinstance(node, ast.JoinedStr):
            values = [v.value if isinstance(v, ast.Constant) else "x" for v in node.values]
            passed_over |= {id(part) for part in ast.walk(node)}
            yield node.lineno, "".join(map(str, values))
        elif isinstance(node, ast.Constant) and id(node) not in passed_over:
            yield node.lineno, str(node.value)


def test_messages_have_options_as_values() -> None:
    """So that a caller of functions does not read of a command's options."""
    typed = [
        f"{path}:{line} {text}"
        for path in MODULES
        if path.relative_to(ROOT).as_posix() not in OTHERS
        for line, text in _texts(path)
        if _OPTION.search(_COMMAND.sub("", text))
    ]
    assert typed == []


def test_no_message_is_made_before_somebody_asks() -> None:
    """A constant of a module would have the words of nobody in particular."""
    for path in MODULES:
        names = {option.name.replace("-", "_").upper() for option in OPTIONS}
        for node in tree(path).body:
            if isinstance(node, ast.Assign):
                inner = (n for n in ast.walk(node) if isinstance(n, ast.FormattedValue))
                used = {n.id for each in inner for n in ast.walk(each) if isinstance(n, ast.Name)}
                assert not used & names, f"{path}:{node.lineno}"


def test_a_note_of_a_conversion_and_its_error_name_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FIXTURES / "zero2-bf16-w2"
    record = ckpt.to_fp32(source, tmp_path / "a")
    run("to-fp32", source, "-o", tmp_path / "b")
    assert "--config DIR takes config.json" in capsys.readouterr().err
    assert any("config=DIR takes config.json" in note for note in record.notes)
    with pytest.raises(CheckpointError, match="overwrite=True replaces it, output= names another"):
        ckpt.to_fp32(source, tmp_path / "a")
    run("to-fp32", source, "-o", tmp_path / "b", code=1)
    assert "--overwrite replaces it, -o names another folder" in capsys.readouterr().err
