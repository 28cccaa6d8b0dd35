"""A conversion that was interrupted says whether it goes on, and with what."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from oracles import FIXTURES, run
from run_folders import commit

from ckpt.cli import planned
from ckpt.cli.main import main
from ckpt.folders import staging
from ckpt.weights.conversion import convert
from converters.execute import workers
from converters.storage import local

SOURCE = FIXTURES / "zero2-bf16-w2"
GOES_ON = "the same command continues where it stopped"
COMMANDS = {
    "to-fp32": ["to-fp32", SOURCE, "--max-shard-size", "300B"],
    "reshard": ["reshard", SOURCE, "--world-size", "3"],
    "to-universal": ["to-universal", SOURCE],
}


@pytest.fixture(params=COMMANDS)
def words(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command that makes ``tmp_path / "o"``."""
    return [*map(str, COMMANDS[request.param]), "--workers", "1", "-o", str(tmp_path / "o")]


def interrupt_after(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as the piece after these is made."""
    make, calls = workers.Worker.make, [0]

    def interrupted(self: workers.Worker, piece: workers.Piece) -> memoryview:
        calls[0] += 1
        if calls[0] > pieces:
            raise KeyboardInterrupt
        return make(self, piece)

    monkeypatch.setattr(workers.Worker, "make", interrupted)


def interrupted(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 130
    return capsys.readouterr().err


def test_it_goes_on_with_the_shards_that_are_there_and_says_how_many(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(30 if words[0] == "reshard" else 12, patch)
        said = interrupted(words, capsys)
    assert said.rstrip().endswith(GOES_ON) and "shards are there; " in said
    assert not (tmp_path / "o").exists()

    capsys.readouterr()
    run(*words)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("ckpt: continuing: ")
    assert first.endswith(" shards are there, checking them")
    assert (tmp_path / "o").is_dir()


def test_where_nothing_is_left_it_does_not_promise_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["to-fp32", str(SOURCE), "-o", str(tmp_path / "o")]  # one shard
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        said = interrupted(words, capsys)
    assert "nothing is left of the output; the same command starts over" in said
    assert list(tmp_path.iterdir()) == []
    run(*words)
    assert "continuing" not in capsys.readouterr().err


def test_commands_that_write_nothing_promise_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planned, "show", interrupt)
    assert interrupted(["show", str(SOURCE)], capsys).splitlines()[-1] == "ckpt: interrupted"


def test_what_another_plan_left_is_not_gone_on_with(tmp_path: Path) -> None:
    output = tmp_path / "o"
    left = convert.plan(SOURCE, output, max_shard_size="300B")
    staged = staging.folder_for(output)
    staged.mkdir()
    (staged / "plan.json").write_text(left.plan.digest())
    for shard in left.plan.shards[:2]:
        (staged / shard.filename).write_bytes(bytes(shard.nbytes))
    (staged / left.plan.shards[2].filename).write_bytes(b"cut short")
    found = convert.continuation(left)
    assert found is not None
    assert (found.present, found.total) == (2, len(left.plan.shards))
    assert convert.continuation(convert.plan(SOURCE, output, dtype="bf16")) is None


def test_a_dry_run_that_would_not_fit_says_so(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: usage(1000))
    run(*words, "--dry-run", code=1)
    printed = capsys.readouterr()
    assert "has 1,000 bytes free, the output needs " in printed.err
    assert "make room or choose another folder with -o" in printed.err
    assert "free" in printed.out  # the plan is printed all the same
    run(*words, code=1)
    assert capsys.readouterr().err == printed.err

    run(*words, "--dry-run", "--json", code=1)
    assert "has 1,000 bytes free, the output needs " in capsys.readouterr().out


def test_a_dry_run_of_collect_says_no_where_collect_says_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "node0/checkpoint-2"
    shutil.copytree(FIXTURES / "trainer-zero2/checkpoint-2", folder)
    commit(folder, 2)
    (tmp_path / "file").touch()
    run("collect", folder, "-o", tmp_path / "file/out", "--dry-run", code=1)
    assert "is not a folder, so" in capsys.readouterr().err
    run("collect", folder, "-o", tmp_path / "out", "--dry-run")

    usage = namedtuple("usage", "free")
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: usage(1000))
    for options in (["--dry-run"], []):
        run("collect", folder, "-o", tmp_path / "out", *options, code=1)
        assert "has 1,000 bytes free" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "node0"]
