"""What was typed wrong is answered with what to type: commands, options, arguments."""

from __future__ import annotations

import subprocess
import sys

import pytest
from oracles import ROOT, run

from ckpt.cli.main import commands
from ckpt.cli.usage.synonyms import OPTIONS, SYNONYMS


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("convert", "Use ckpt to-fp32: make a model folder of fp32 or 16-bit weights."),
        ("to_fp32", "Use ckpt to-fp32: "),
        ("zero_to_fp32.py", "Use ckpt to-fp32: "),
        ("tofp32", "Did you mean ckpt to-fp32?"),
        ("merge", "Use ckpt to-fp32 --merge."),
        ("upload", "Use ckpt push: "),
        ("uplaod", "Did you mean ckpt push?"),
        ("list", "Use ckpt ls: "),
        ("inspect", "Use ckpt show: "),
        ("download", "Use ckpt pull: "),
        ("rm", "Use ckpt prune: delete checkpoints that no rule keeps."),
        ("version", "Use ckpt --version."),
        ("help", "Use ckpt --help."),
        ("resume", "ckpt.resume is for Python; ckpt latest prints"),
    ],
)
def test_an_unknown_command_names_the_one_that_is_meant(
    word: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(word, "out", code=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"Error: No such command '{word}'") and answer in line


def test_a_word_that_is_like_no_command_gets_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    run("xyzzy", code=2)
    assert capsys.readouterr().err.endswith("Error: No such command 'xyzzy'.\n")


def test_a_path_in_the_place_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    run("out/checkpoint-1", code=2)
    assert "name a command first: ckpt show out/checkpoint-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "answer"),
    [
        *(("reshard", word, "Use --world-size.") for word in ("--ranks", "--gpus", "--nproc")),
        ("from-universal", "--num-gpus", "Use --world-size."),
        ("from-dcp", "--ranks", "Use --world-size."),
        ("reshard", "--zero-stage", "Use --stage."),
        ("to-universal", "--gpus", "No such option '--gpus'."),  # it has none like it
    ],
)
def test_an_option_of_other_tools_names_the_one_that_is_meant(
    command: str, option: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, "out", option, "3", code=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"Error: No such option '{option}'.") and line.endswith(answer)
    assert "--workers" not in line and "--tp" not in line


def test_every_name_of_an_option_stands_for_one_and_is_none_itself() -> None:
    spellings = {
        text for command in commands().values() for param in command.params for text in param.opts
    }
    assert spellings >= {f"--{option}" for option in OPTIONS}
    assert not spellings & {f"--{word}" for words in OPTIONS.values() for word in words}


@pytest.mark.parametrize("command", ["to-fp32", "--help"])
def test_the_first_help_says_that_fsdp_is_read(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*([command, "--help"] if command != "--help" else [command]))
    assert "ZeRO" in (text := capsys.readouterr().out) and "FSDP" in text.partition("Options:")[0]


def test_every_synonym_stands_for_a_command_and_is_none_itself() -> None:
    words = [word for each in SYNONYMS.values() for word in each]
    assert len(words) == len(set(words)) and not {*words} & commands().keys()
    for line in SYNONYMS:
        name, *options = line.split()
        if name.startswith("--"):
            continue
        spellings = {text for param in commands()[name].params for text in param.opts}
        assert spellings >= set(options)


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (["to-fp32", "a", "b"], "takes CHECKPOINT; b is too much. To write to b, say -o b."),
        (["reshard", "a", "b"], "To write to b, say -o b."),
        (["verify", "a", "b", "c"], "takes CHECKPOINT|RUN; b, c are too much. Call it once for"),
        (["push", "a", "o/n", "c"], "takes CHECKPOINT|RUN|MODEL and ORG/NAME; c is too much."),
    ],
)
def test_an_argument_too_many_is_told_where_it_belongs(
    args: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*args, code=2)
    assert answer in capsys.readouterr().err


def test_help_loads_no_room_but_the_command_line() -> None:
    code = (
        "import sys; from ckpt.cli.main import commands; commands()\n"
        "assert not {'ckpt.runs', 'converters.detect', 'numpy', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("option", ["--safe_serialization", "--safe-serialization"])
def test_an_option_of_deepspeeds_script_is_answered(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("to-fp32", "out", option, code=2)
    assert "leave it out: safetensors is what ckpt to-fp32 writes" in capsys.readouterr().err
