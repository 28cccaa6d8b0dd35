"""Whose checkpoints a folder holds: runs, lines in them, and what that means for each command."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree
from uuid import uuid4

import pytest
from oracles import run as command
from run_folders import SOURCE, listed, real

from ckpt.folders import filenames
from ckpt.resuming import select
from ckpt.runs import manifest, pruning
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import Manifest
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run, RunCheckpoint, leading, members, open_checkpoint
from ckpt.runs.states import choice, offers
from ckpt.runs.upkeep import adoption
from ckpt.runs.upkeep.doctor import diagnose
from ckpt.saving.commit import collision, identity
from ckpt.saving.commit.pointers import after_commit
from converters.errors import CheckpointError

CLOCK = iter(range(1_000_000, 9_000_000))


def save(
    folder: Path, step: int, line: Line | None, name: str | None = None, tier: str = "full"
) -> RunCheckpoint:
    """A committed checkpoint of a few bytes, saved after all that were saved before."""
    path = folder / (name or f"checkpoint-{step}")
    (path / "global_step2").mkdir(parents=True)
    (path / "global_step2/mp_rank_00_model_states.pt").write_bytes(b"x" * step)
    (path / "latest").write_text("global_step2")
    record = Manifest(
        step,
        "global_step2" if tier == "full" else None,
        tier,
        uuid4().hex,
        float(next(CLOCK)),
        2,
        2,
        files=listed(path),
        run=line.run if line else None,
        line=line.at(step) if line else (),
    )
    (path / filenames.MANIFEST).write_bytes(record.dumps())
    return open_checkpoint(path)


def resumed(checkpoint: RunCheckpoint) -> Line:
    assert checkpoint.step is not None
    return Line.go_on(checkpoint.manifest, checkpoint.step)


def names(checkpoints: object) -> list[str]:
    return [checkpoint.name for checkpoint in checkpoints]  # type: ignore[attr-defined]


def test_a_manifest_keeps_the_run_and_its_line(tmp_path: Path) -> None:
    line = Line("ab" * 16, "cd" * 16, (("", 3), ("ef" * 16, 5)))
    record = save(tmp_path, 7, line).manifest
    assert record is not None
    assert (record.run, record.line) == (line.run, (("", 3), ("ef" * 16, 5), ("cd" * 16, 7)))
    assert Line.of(record) == line


def test_a_manifest_without_ids_is_read_as_before(tmp_path: Path) -> None:
    save(tmp_path, 2, None)
    path = tmp_path / "checkpoint-2/manifest.json"
    held = json.loads(path.read_bytes())
    for name in ("run", "line", "digest"):
        del held[name]
    path.write_text(json.dumps(held))
    found = open_checkpoint(path.parent)
    assert found.committed and found.manifest is not None
    assert found.manifest.run is None and found.manifest.line == ()


@pytest.mark.parametrize("line", [[["zz", 1]], [["ab" * 16, -1]], [["ab" * 16]], "no", [3]])
def test_a_line_that_is_none_is_refused(tmp_path: Path, line: object) -> None:
    save(tmp_path, 2, Line.begin())
    path = tmp_path / "checkpoint-2/manifest.json"
    held = json.loads(path.read_bytes()) | {"line": line}
    del held["digest"]
    path.write_text(json.dumps(held))
    with pytest.raises(CheckpointError):
        manifest.read(path.parent)


def test_every_resume_carries_the_run_over() -> None:
    first = Line.begin()
    second = Line.go_on(
        Manifest(4, "t", "full", "ab" * 16, 0.0, 2, 2, run=first.run, line=first.at(4)), 4
    )
    assert second.run == first.run and second.launch != first.launch
    assert second.ancestors == ((first.launch, 4),)


def test_rotation_counts_this_runs_checkpoints_only(tmp_path: Path) -> None:
    """Rows 1 and 1b: every new checkpoint was deleted at its own commit."""
    old, new = Line.begin(), Line.begin()
    for step in (6, 8):
        save(tmp_path, step, old)
    for step in (2, 4, 5):
        path = save(tmp_path, step, new).folder
        after_commit(tmp_path, Retention(last=2), path, new)
        assert path.is_dir()
    assert names(Run(tmp_path).checkpoints()) == [f"checkpoint-{n}" for n in (4, 5, 6, 8)]
    assert Run(tmp_path).target("latest") == "checkpoint-5/global_step2"
    newest = Run(tmp_path).newest()
    assert newest is not None and newest.name == "checkpoint-5"


def test_a_training_that_went_back_is_the_newest(tmp_path: Path) -> None:
    first = Line.begin()
    steps = {step: save(tmp_path, step, first) for step in (2, 4, 6, 8)}
    back = resumed(steps[4])
    later = save(tmp_path, 5, back)
    after_commit(tmp_path, Retention(last=2), later.folder, back)
    assert names(members(Run(tmp_path).checkpoints())) == ["checkpoint-4", "checkpoint-5"]
    assert names(Run(tmp_path).checkpoints()) == [f"checkpoint-{n}" for n in (4, 5, 6, 8)]
    assert Run(tmp_path).target("latest") == "checkpoint-5/global_step2"

    again = resumed(later)
    last = save(tmp_path, 7, again)
    after_commit(tmp_path, Retention(last=2), last.folder, again)
    assert names(members(Run(tmp_path).checkpoints())) == ["checkpoint-5", "checkpoint-7"]


def test_older_manifests_are_one_run_that_goes_on(tmp_path: Path) -> None:
    steps = {step: save(tmp_path, step, None) for step in (2, 4, 6)}
    line = resumed(steps[4])
    save(tmp_path, 5, line)
    assert names(members(Run(tmp_path).checkpoints())) == [f"checkpoint-{n}" for n in (2, 4, 5)]


def test_a_resume_follows_the_run_that_saved_last_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (choice, offers):
        monkeypatch.setattr(module, "unusable", lambda c: c.unusable)
    old, new = Line.begin(), Line.begin()
    save(tmp_path, 8, old)
    save(tmp_path, 2, new)
    assert select.find(tmp_path) == str(tmp_path / "checkpoint-2")
    told = caplog.text
    assert f"run {str(new.run)[:6]} saved last" in told
    assert f"checkpoint-8 of run {str(old.run)[:6]}" in told

    (tmp_path / "checkpoint-2/latest").unlink()  # now nothing of the new run is whole
    with pytest.raises(CheckpointError, match="checkpoint-8") as error:
        select.find(tmp_path)
    assert "to go on from it" in str(error.value)
    assert select.find(tmp_path / "checkpoint-8") == str(tmp_path / "checkpoint-8")


def test_what_a_run_gave_up_is_told_from_what_others_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (choice, offers):
        monkeypatch.setattr(module, "unusable", lambda c: c.unusable)
    old, own = Line.begin(), Line.begin()
    save(tmp_path, 2, old)
    start = save(tmp_path, 4, own)
    save(tmp_path, 6, own, name="weights-6", tier="weights")
    back = resumed(start)
    statement = f"weights-6, given up when run {str(own.run)[:6]} went back to an earlier step"
    with caplog.at_level(logging.WARNING, "ckpt"):
        identity.warn_of_others(tmp_path, back)
    assert f"checkpoint-2 of run {str(old.run)[:6]}; {statement}" in caplog.text

    caplog.clear()
    save(tmp_path, 8, back)
    assert select.find(tmp_path) == str(tmp_path / "checkpoint-8")
    assert f"takes others only by name: checkpoint-2 of run {str(old.run)[:6]}" in caplog.text
    assert statement in caplog.text


@pytest.mark.parametrize("pointed", [False, True])
def test_what_another_run_saved_gets_another_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pointed: bool
) -> None:
    old, new = Line.begin(), Line.begin()
    other = save(tmp_path, 6, old)
    if pointed:
        Run(tmp_path).point("best", other)
    with caplog.at_level(logging.WARNING, "ckpt"):
        path = collision.make_way(other.folder, new)
    assert path is not None and path.name == f"checkpoint-6.run-{str(old.run)[:6]}"
    assert open_checkpoint(path).committed and not other.folder.exists()
    assert path.name in caplog.text and "whole" not in caplog.text
    assert Run(tmp_path).target("best") == (f"{path.name}/global_step2" if pointed else None)
    save(tmp_path, 6, Line(old.run, "12" * 16))
    assert collision.make_way(other.folder, new) == path.with_name(f"{path.name}-2")


def test_the_command_in_the_message_deletes_what_was_set_aside_and_no_copy_by_hand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = Line.begin()
    for step, line in ((2, new), (4, Line(None, "")), (6, Line.begin())):
        checkpoint = save(tmp_path, step, line)
        assert checkpoint.manifest is not None
        named = replace(checkpoint.manifest, name=checkpoint.name)
        (checkpoint.folder / filenames.MANIFEST).write_bytes(named.dumps())
    copytree(tmp_path / "checkpoint-4", tmp_path / "keep-me")
    asides = [collision.make_way(tmp_path / f"checkpoint-{step}", new) for step in (4, 6)]
    assert asides[0] is not None and asides[0].name == "checkpoint-4.foreign"
    assert f"ckpt prune {tmp_path} --others deletes it" in caplog.text

    for step in (4, 6):
        save(tmp_path, step, new)
    pruning.prune_others(Run(tmp_path))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "keep-me"}


def test_a_link_that_leads_nowhere_gets_another_name_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoint-4").symlink_to("../disk/checkpoint-4")
    path = collision.make_way(tmp_path / "checkpoint-4", Line.begin())
    assert path is not None and path.name == "checkpoint-4.foreign" and path.is_symlink()
    assert "It is a link to ../disk/checkpoint-4, which is not there" in caplog.text

    # as Lightning's last.ckpt, whose checkpoint was deleted in its turn
    (tmp_path / "last.ckpt").symlink_to("step=2.ckpt")
    assert collision.make_way(tmp_path / "last.ckpt", Line.begin()) is None


def test_its_own_checkpoint_and_a_torn_one_are_replaced(tmp_path: Path) -> None:
    line = Line.begin()
    folder = save(tmp_path, 6, line).folder
    assert collision.make_way(folder, line) is None
    assert collision.make_way(folder, resumed(open_checkpoint(folder))) is None
    assert collision.make_way(folder, Line.begin()) is not None

    folder = save(tmp_path, 7, identity.begin()).folder  # by this process, in a training before
    assert collision.make_way(folder, Line.begin()) is None
    (folder / filenames.MANIFEST).unlink()
    assert collision.make_way(folder, line) is None  # torn: its state file is no such file
    assert collision.make_way(tmp_path / "checkpoint-9", line) is None


def test_the_first_line_of_a_new_training_names_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = Line.begin(), Line.begin()
    steps = [save(tmp_path, step, old) for step in (6, 8)]
    (tmp_path / "checkpoint-3/global_step3").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "ckpt"):
        identity.warn_of_others(tmp_path, new)
    first, second = (record.getMessage() for record in caplog.records)
    assert f"checkpoint-6 and checkpoint-8 of run {str(old.run)[:6]}" in first
    assert f"it begins run {str(new.run)[:6]}" in first and "--others" in first
    assert "checkpoint-3, written without ckpt" in second

    stock = tmp_path / "stock"
    (stock / "checkpoint-3/global_step3").mkdir(parents=True)
    caplog.clear()
    identity.warn_of_others(stock, identity.line_in(stock, 3))  # which has loaded it
    assert not caplog.records
    identity.warn_of_others(stock, identity.line_in(stock, 0))
    assert "does not go on from it" in caplog.text

    caplog.clear()
    with caplog.at_level(logging.WARNING, "ckpt"):
        identity.warn_of_others(tmp_path, resumed(steps[1]))
        assert not caplog.records
        identity.warn_of_others(tmp_path, resumed(steps[0]))
    assert "went back to an earlier step" in caplog.text
    identity.warn_of_others(tmp_path / "absent", new)


def test_the_command_line_shows_and_removes_other_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "unusable", lambda checkpoint: checkpoint.unusable)
    first, second, third = Line.begin(), Line.begin(), Line.begin()
    save(tmp_path, 8, first)
    save(tmp_path, 9, second)
    save(tmp_path, 2, third)
    save(tmp_path, 3, third)
    run = Run(tmp_path)
    run.point("latest", leading(run.checkpoints()))
    assert not diagnose(run).findings

    command("ls", str(tmp_path))
    table = capsys.readouterr().out
    assert f"{str(first.run)[:6]} (not counted)" in table and str(third.run)[:6] in table
    command("ls", str(tmp_path), "--json")
    entries = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [entry["current"] for entry in entries] == [True, True, False, False]
    assert entries[2]["run"] == first.run

    command("latest", str(tmp_path))
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "checkpoint-3")
    assert f"of run {str(second.run)[:6]}" in shown.err

    command("prune", str(tmp_path), "--keep-last", "1")
    assert names(run.checkpoints()) == ["checkpoint-3", "checkpoint-8", "checkpoint-9"]
    assert "not of the run that saved last" in capsys.readouterr().out
    command("prune", str(tmp_path), "--others", "--run", str(first.run)[:8])
    assert names(run.checkpoints()) == ["checkpoint-3", "checkpoint-9"]
    command("prune", str(tmp_path), "--others", "--dry-run")
    assert names(run.checkpoints()) == ["checkpoint-3", "checkpoint-9"]
    command("prune", str(tmp_path), "--others")
    assert names(run.checkpoints()) == ["checkpoint-3"]
    with pytest.raises(CheckpointError, match="no checkpoint of run abc"):
        pruning.prune_others(run, "abc")


def test_what_is_made_of_a_checkpoint_is_of_its_run(tmp_path: Path) -> None:
    line = Line.begin()
    source = real(tmp_path / "out", 2)
    assert source.manifest is not None
    record = replace(source.manifest, run=line.run, line=line.at(2))
    (source.folder / filenames.MANIFEST).write_bytes(record.dumps())

    command("reshard", source.folder, "--world-size", "1", "-o", tmp_path / "one")
    command("slim", source.folder, "--force")
    for folder in (tmp_path / "one", source.folder):
        made = manifest.read(folder)
        assert (made.run, made.line) == (line.run, line.at(2))


def test_an_adopted_checkpoint_goes_on_with_the_run_before_it(tmp_path: Path) -> None:
    line = Line.begin()
    saved = save(tmp_path, 1, line)
    folder = tmp_path / "checkpoint-2"
    copytree(SOURCE, folder)
    adoption.commit(folder)
    record = manifest.read(folder)
    assert record.run == line.run and record.line[0] == (line.launch, 1)
    assert names(members(Run(tmp_path).checkpoints())) == ["checkpoint-1", "checkpoint-2"]
    assert saved.committed


def test_copies_by_hand_and_links_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    line = Line.begin()
    for step in (2, 4, 6):
        save(tmp_path, step, line)
    copytree(tmp_path / "checkpoint-6", tmp_path / "checkpoint-6-backup")
    copytree(tmp_path / "checkpoint-2", tmp_path / "keep-me")
    (tmp_path / "stable").symlink_to("checkpoint-4")

    folder = save(tmp_path, 8, line).folder
    after_commit(tmp_path, Retention(last=2), folder, line)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()}
    numbered = {"checkpoint-4", "checkpoint-6", "checkpoint-8"}  # to one of which stable leads
    assert left == numbered | {"checkpoint-6-backup", "keep-me"}
    pruning.prune_others(Run(tmp_path))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == left | {"stable"}
    newest = Run(tmp_path).newest()
    assert newest is not None and newest.name == "checkpoint-8"


def test_of_one_save_without_names_the_numbered_one_counts(tmp_path: Path) -> None:
    for step in (2, 4):
        real(tmp_path, step)
    copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-4-backup")
    pruning.prune(Run(tmp_path), Retention(last=2))
    assert len(Run(tmp_path).checkpoints()) == 3
    newest = Run(tmp_path).newest()
    assert newest is not None and newest.name == "checkpoint-4"


def test_a_pointer_to_a_link_protects_what_it_leads_to(tmp_path: Path) -> None:
    line = Line.begin()
    for step in (2, 4, 6):
        save(tmp_path, step, line)
    (tmp_path / "last").symlink_to("checkpoint-2")
    (tmp_path / "best").write_text("last/global_step2")
    pruning.prune(Run(tmp_path), Retention(last=1))
    assert names(Run(tmp_path).checkpoints()) == ["last", "checkpoint-2", "checkpoint-6"]


def test_what_went_on_is_later_whatever_the_clocks_say(tmp_path: Path) -> None:
    line = Line.begin()
    first = save(tmp_path, 6, line)
    assert first.manifest is not None
    ahead = replace(first.manifest, created=first.manifest.created + 1e9)
    (first.folder / filenames.MANIFEST).write_bytes(ahead.dumps())
    save(tmp_path, 8, resumed(first))
    assert names(members(Run(tmp_path).checkpoints())) == ["checkpoint-6", "checkpoint-8"]


def test_resharding_an_old_checkpoint_changes_nothing_about_who_leads(tmp_path: Path) -> None:
    old, new = Line.begin(), Line.begin()
    source = real(tmp_path, 2)
    assert source.manifest is not None
    for number, line in enumerate((old, new)):
        record = replace(source.manifest, run=line.run, line=line.at(2), created=float(number))
        folder = tmp_path / f"checkpoint-{number}"
        copytree(source.folder, folder)
        (folder / filenames.MANIFEST).write_bytes(replace(record, name=folder.name).dumps())
    rmtree(source.folder)

    command("reshard", tmp_path / "checkpoint-0", "--world-size", "1")
    assert names(members(Run(tmp_path).checkpoints())) == ["checkpoint-1"]
    made = open_checkpoint(tmp_path / "checkpoint-0-w1")
    assert made.original and made.manifest is not None and made.manifest.run == old.run


def test_what_was_resharded_goes_with_what_it_was_made_of(tmp_path: Path) -> None:
    line = Line.begin()
    for step in (2, 4, 6):
        save(tmp_path, step, line)
    save(tmp_path, 4, line, "checkpoint-4-w1")
    pruning.prune(Run(tmp_path), Retention(last=2))
    left = {"checkpoint-4-w1", "checkpoint-4", "checkpoint-6"}
    assert {*names(Run(tmp_path).checkpoints())} == left
    pruning.prune(Run(tmp_path), Retention(last=1))
    assert names(Run(tmp_path).checkpoints()) == ["checkpoint-6"]


def test_the_last_that_training_can_go_on_from_is_never_one_of_the_others(tmp_path: Path) -> None:
    save(tmp_path, 6, Line.begin())
    torn = save(tmp_path, 4, Line.begin())
    (torn.folder / "latest").unlink()
    with pytest.raises(CheckpointError, match="nothing is deleted"):
        pruning.prune_others(Run(tmp_path))
    assert (tmp_path / "checkpoint-6").is_dir()
