"""What ckpt made of a checkpoint stands beside it, and is never taken in its place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import stock_checkpoints
from oracles import run as command
from run_folders import SOURCE, real

import ckpt
from ckpt.engine.layout import Topology
from ckpt.folders import filenames
from ckpt.hub.select import chosen
from ckpt.resuming import select
from ckpt.runs import ancestry, manifest, pruning
from ckpt.runs.ancestry import Ancestry, Record
from ckpt.runs.manifest import Manifest
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run, RunCheckpoint, leading, open_checkpoint, original_of
from ckpt.runs.states import target
from ckpt.runs.states.offer_order import newest_first
from ckpt.runs.states.offers import Offers
from ckpt.runs.upkeep import adoption
from ckpt.runs.upkeep.doctor import diagnose, mend
from converters.errors import CheckpointError

RESHARDED = "resharded from checkpoint-8 (2 ranks, stage 2)"


def saved(run: Path, step: int = 8) -> RunCheckpoint:
    """A committed checkpoint of the step in its name and its manifest."""
    checkpoint = real(run, step, {"eval_loss": 1.0})
    assert checkpoint.manifest is not None
    record = replace(checkpoint.manifest, name=checkpoint.name)
    (checkpoint.folder / filenames.MANIFEST).write_bytes(record.dumps())
    return open_checkpoint(checkpoint.folder)


def stock(run: Path) -> None:
    """A checkpoint that was written without ckpt."""
    shutil.copytree(SOURCE, run / "checkpoint-2")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, and what was made of it in three ways, by default outputs."""
    folder = tmp_path_factory.mktemp("derived") / "out"
    original = saved(folder)
    command("reshard", original.folder, "--world-size", "4")
    command("reshard", original.folder, "--world-size", "1", "--stage", "3")
    command("to-universal", original.folder)
    return folder


@pytest.fixture
def out(template: Path, tmp_path: Path) -> Run:
    """The run, to be changed."""
    return Run(shutil.copytree(template, tmp_path / "out"))


def rows(run: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    command("ls", run, "--json")
    entries = json.loads(capsys.readouterr().out)["checkpoints"]
    return {entry["name"]: entry for entry in entries}


def test_they_are_listed_as_what_they_were_made_of(
    out: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    origins = {name: row["origin"] for name, row in rows(out.path, capsys).items()}
    assert origins == {
        "checkpoint-8": None,
        "checkpoint-8-w4": RESHARDED,
        "checkpoint-8-z3-w1": RESHARDED,
        "checkpoint-8_universal": "universal, made from checkpoint-8",
    }
    command("ls", out.path)
    table = capsys.readouterr().out
    assert table.splitlines()[-1].split()[1] == "checkpoint-8"  # the newest is the last
    assert table.count(RESHARDED) == 2 and "universal, made from checkpoint-8; complete\n" in table
    assert "not committed" not in table and "without ckpt" not in table


def test_no_command_takes_one_in_the_place_of_the_original(
    out: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    original = out.path / "checkpoint-8"
    for newest in (out.newest(), out.newest(None), leading(out.checkpoints())):
        assert newest is not None and newest.folder == original
    for best in (None, ("eval_loss", "min", 1)):
        assert chosen(out.path, best).checkpoint.folder == original
    assert out.find("8").folder == original
    assert ckpt.find(out.path) == str(original)

    capsys.readouterr()
    command("latest", out.path)
    printed = capsys.readouterr()
    assert printed.out == f"{original}\n" and "passed over" not in printed.err


def test_doctor_points_at_the_original_and_has_nothing_against_the_others(out: Run) -> None:
    assert [finding.path.name for finding in diagnose(out).findings] == ["latest"]
    assert mend(out)[1].findings == ()
    assert out.target() == "checkpoint-8/global_step2"

    out.point("latest", out.find("checkpoint-8-w4"))  # as doctor itself did once
    (finding,) = diagnose(out).findings
    assert RESHARDED in finding.what
    mend(out)
    assert out.target() == "checkpoint-8/global_step2"


def test_they_stay_and_go_with_the_original_and_never_count(
    out: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def names() -> set[str]:
        return {checkpoint.name for checkpoint in out.checkpoints()}

    saved(out.path, 6)
    everything = names()
    pruning.prune(out, Retention(last=2))
    assert names() == everything

    pruning.prune(out, Retention(last=1))
    assert names() == everything - {"checkpoint-6"}
    (reason,) = (
        outcome.reason
        for outcome in pruning.plan(out, Retention(last=1))
        if outcome.checkpoint.name == "checkpoint-8-w4"
    )
    assert reason == "made of checkpoint-8"

    # whatever they are called
    (out.path / "checkpoint-8-w4").rename(out.path / "checkpoint-9")
    record = manifest.read(out.path / "checkpoint-9")
    (out.path / "checkpoint-9/manifest.json").write_bytes(
        replace(record, name="checkpoint-9").dumps()
    )
    pruning.prune(out, Retention(last=1))
    assert {"checkpoint-8", "checkpoint-9"} < names()

    saved(out.path, 10)
    pruning.prune(out, Retention(last=1))
    assert names() == {"checkpoint-10", "checkpoint-8_universal"}  # of which no rule says a word
    assert rows(out.path, capsys).keys() == names()


def test_where_the_original_is_gone_they_count_like_any_other(out: Run) -> None:
    shutil.rmtree(out.path / "checkpoint-8")
    newest = out.newest()
    assert newest is not None and newest.name in ("checkpoint-8-w4", "checkpoint-8-z3-w1")
    assert ckpt.find(out.path) == str(newest.folder)
    saved(out.path, 6)
    assert out.newest() == newest


def test_where_the_original_cannot_be_gone_on_from_they_count(out: Run) -> None:
    command("slim", out.path / "checkpoint-8", "--force")
    newest = out.newest()
    assert newest is not None and newest.name != "checkpoint-8"
    slimmed = open_checkpoint(out.path / "checkpoint-8")
    assert slimmed.origin == "slimmed from a full checkpoint (2 ranks, stage 2)"


def test_a_resume_takes_the_one_that_fits(out: Run) -> None:
    def first(stage: int, ranks: int) -> str:
        return newest_first(out.checkpoints(), Topology(stage, ranks).fits)[0].name

    assert first(2, 2) == "checkpoint-8"
    assert first(2, 4) == "checkpoint-8-w4"
    assert first(3, 1) == "checkpoint-8-z3-w1"
    assert first(3, 64) == "checkpoint-8"

    fits = Topology(2, 4).fits
    by_step = select.select_checkpoint(None, out.path, "8", fits=fits, deepspeed=False)
    assert by_step is not None and by_step.name == "checkpoint-8-w4"
    by_step = select.select_checkpoint(None, out.path, "8", deepspeed=False)
    assert by_step is not None and by_step.name == "checkpoint-8"


def test_what_is_made_of_a_checkpoint_without_a_manifest_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path)
    command("reshard", tmp_path / "checkpoint-2", "--world-size", "1")
    made = open_checkpoint(tmp_path / "checkpoint-2-w1")
    assert made.manifest is None and made.record is not None
    assert (made.record.stage, made.record.world_size, made.step) == (2, 1, 2)
    assert made.origin == RESHARDED.replace("8", "2")
    row = rows(tmp_path, capsys)["checkpoint-2-w1"]
    assert row["origin"] == RESHARDED.replace("8", "2") and row["written_by"] == "ckpt"
    present = Run(tmp_path).checkpoints()
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-2")

    def first(ranks: int) -> str:
        return newest_first(present, Topology(2, ranks).fits)[0].name

    assert [first(ranks) for ranks in (1, 2, 3)] == ["checkpoint-2-w1", *["checkpoint-2"] * 2]


def test_an_adopted_one_remains_what_it_was_made_of(tmp_path: Path) -> None:
    stock(tmp_path)
    command("reshard", tmp_path / "checkpoint-2", "--world-size", "1")
    newest = []
    command("to-universal", tmp_path / "checkpoint-2")
    statuses = adoption.survey(Run(tmp_path).checkpoints(), wait=False)
    outcomes = adoption.adopt(statuses, dry_run=True)
    adopted = {outcome.folder.name for outcome in outcomes if outcome.adopted}
    assert adopted == {"checkpoint-2", "checkpoint-2-w1"}
    assert not any(outcome.failed for outcome in outcomes)
    for name in ("checkpoint-2-w1", "checkpoint-2"):
        adoption.commit(tmp_path / name)
        newest.append(Run(tmp_path).newest())
    # what was made of another one does not count, whether that is committed or not
    assert [entry and entry.name for entry in newest] == [None, "checkpoint-2"]
    made = manifest.read(tmp_path / "checkpoint-2-w1")
    assert made.is_derived and made.origin is not None and made.origin.name == "checkpoint-2"


@pytest.mark.parametrize("form", ["reshard", "to-universal"])
def test_an_original_without_a_manifest_is_known_under_another_name(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path)
    options = ("--world-size", "4") if form == "reshard" else ()
    command(form, tmp_path / "checkpoint-2", *options)
    (tmp_path / "checkpoint-2").rename(tmp_path / "final")
    assert ckpt.find(tmp_path) == str(tmp_path / "final")

    run = Run(tmp_path)
    command("doctor", tmp_path, "--adopt", "--now")
    assert ckpt.find(tmp_path) == str(tmp_path / "final")
    assert [finding.path.name for finding in mend(run)[0]] == ["latest"]
    assert diagnose(run).findings == () and run.target() == "final/global_step2"
    reasons = {
        outcome.checkpoint.name: outcome.reason for outcome in pruning.plan(run, Retention(last=1))
    }
    assert reasons["final"].startswith("newest")
    if form == "reshard":
        assert reasons["checkpoint-2-w4"] == "made of final"


def test_one_that_was_renamed_stays_and_what_was_made_of_it_is_not_the_newest(
    out: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(out.path, 4), saved(out.path, 6)
    (out.path / "checkpoint-8").rename(out.path / "final")
    assert ckpt.find(out.path) == str(out.path / "final")
    capsys.readouterr()
    command("prune", out.path, "--keep-last", "1", "--dry-run")
    rows = capsys.readouterr().out.splitlines()
    reasons = {Path(row.split("\t")[1]).name: row.split("\t")[3] for row in rows}
    assert reasons == {
        "checkpoint-4": "no rule keeps it",
        "checkpoint-6": "newest, newest full, last 1",
        "checkpoint-8-w4": "made of final",
        "checkpoint-8-z3-w1": "made of final",
        "final": "saved as checkpoint-8 and renamed by hand, so that no rule counts it",
    }


def test_doctor_says_which_of_one_step_was_made_of_another(tmp_path: Path) -> None:
    stock(tmp_path)
    command("reshard", tmp_path / "checkpoint-2", "--world-size", "4")
    state = tmp_path / "checkpoint-2/trainer_state.json"
    state.write_text(state.read_text() + " ")  # so that it is not known to be the original
    (tmp_path / "checkpoint-2").rename(tmp_path / "final")
    command("doctor", tmp_path, "--adopt", "--now")
    sentences = [finding.what for finding in diagnose(Run(tmp_path)).findings]
    assert any(
        "both of step 2; checkpoint-2-w4 was resharded from checkpoint-2 (2 ranks, stage 2); "
        "delete or move one" in sentence
        for sentence in sentences
    )


def test_a_committed_one_is_not_taken_in_the_place_of_an_original_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path)
    original, made = tmp_path / "checkpoint-2", tmp_path / "checkpoint-2-w1"
    command("reshard", original, "--world-size", "1")
    command("doctor", made, "--adopt", "--now")
    assert open_checkpoint(made).committed and not open_checkpoint(original).committed

    assert ckpt.find(tmp_path) == str(original) == str(chosen(tmp_path).checkpoint.folder)
    capsys.readouterr()
    command("latest", tmp_path)
    assert capsys.readouterr().out == f"{original}\n"
    assert mend(Run(tmp_path))[0] == [] and Run(tmp_path).target() is None
    assert ckpt.find(tmp_path, committed_only=True) == str(made)

    present = Run(tmp_path).checkpoints()
    for ranks, expected in ((1, made), (2, original), (3, original)):
        fits = Topology(2, ranks).fits
        assert newest_first(present, fits)[0].folder == expected
        offer = next(iter(Offers(tmp_path, fits)))
        assert offer.checkpoint.folder == expected
        by_step = select.select_checkpoint(None, tmp_path, "2", fits=fits, deepspeed=False)
        assert by_step is not None and by_step.folder == expected

    (original / "trainer_state.json").unlink()  # no resume takes it now
    assert ckpt.find(tmp_path) == str(made)


@pytest.mark.parametrize("options", [[], ["--names", "as-stored"]])
def test_a_model_under_the_name_of_a_later_checkpoint_is_of_the_step_that_it_was_made_of(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path)
    command("to-fp32", tmp_path / "checkpoint-2", "-o", tmp_path / "checkpoint-9", *options)
    row = rows(tmp_path, capsys)["checkpoint-9"]
    assert (row["step"], row["tier"], row["written_by"]) == (2, "weights", "ckpt")
    assert row["origin"] == "weights made from global_step2 of step 2"
    assert open_checkpoint(tmp_path / "checkpoint-9").step == 2
    original = tmp_path / "checkpoint-2"
    assert ckpt.find(tmp_path) == str(original) == str(chosen(tmp_path).checkpoint.folder)
    shutil.rmtree(original)
    assert chosen(tmp_path).checkpoint.folder == tmp_path / "checkpoint-9"


def test_a_universal_folder_of_another_writer_is_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path)
    command("to-universal", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2_universal" / filenames.REWRITING).unlink()
    capsys.readouterr()
    command("doctor", tmp_path)
    printed = capsys.readouterr().err
    assert "complete, in the universal format, which gets no manifest" in printed
    assert "; ckpt from-universal makes native files of it" in printed
    assert "weights" not in printed


def test_a_universal_folder_that_lies_alone_is_the_newest_of_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = saved(tmp_path)
    command("to-universal", original.folder)
    universal = tmp_path / "checkpoint-8_universal"
    shutil.rmtree(original.folder)
    capsys.readouterr()

    for arguments in (["show"], ["to-fp32", "--dry-run", "-o", tmp_path / "m"]):
        command(arguments[0], tmp_path, "--last", *arguments[1:])
        assert capsys.readouterr().err == (
            f"ckpt: the newest checkpoint of {tmp_path} is {universal} (complete, in the "
            "universal format)\n"
        )
    assert chosen(tmp_path).checkpoint.folder == universal
    with pytest.raises(CheckpointError, match=r"from-universal .* makes native files of it"):
        ckpt.find(tmp_path)

    for arguments in (["--adopt"], []):
        command("doctor", tmp_path, *arguments)
        assert "every checkpoint has its manifest" not in capsys.readouterr().err
    command("prune", tmp_path, "--keep-last", "1", "--dry-run")
    assert "not touched: 1 checkpoint is complete, in the universal" in capsys.readouterr().err
    command("verify", universal, "--data")
    said = capsys.readouterr().out
    assert "complete, in the universal format; written by ckpt\n" in said
    assert "have no checksum: " in said  # which no manifest would add

    next(universal.rglob("fp32.pt")).unlink()
    command("doctor", tmp_path, code=1)
    assert "the conversion did not finish: make it again" in capsys.readouterr().out


def test_of_several_rewritings_the_first_source_is_named(tmp_path: Path) -> None:
    original = saved(tmp_path)
    command("reshard", original.folder, "--world-size", "4")
    command("reshard", tmp_path / "checkpoint-8-w4", "--world-size", "3", "-o", tmp_path / "three")
    command("to-universal", tmp_path / "three", "-o", tmp_path / "universal")
    command("from-universal", tmp_path / "universal", "--world-size", "1", "-o", tmp_path / "one")
    present = Run(tmp_path).checkpoints()
    for name in ("three", "universal", "one"):
        made = open_checkpoint(tmp_path / name)
        found = original_of(made, present)
        assert found is not None and found.folder == original.folder, name
    sentence = "resharded from universal, which was made of checkpoint-8"
    assert open_checkpoint(tmp_path / "one").origin == sentence
    sentence = "resharded from checkpoint-8-w4 (4 ranks, stage 2), which was made of checkpoint-8"
    assert open_checkpoint(tmp_path / "three").origin == sentence

    shutil.rmtree(original.folder)
    present = Run(tmp_path).checkpoints()
    for name in ("three", "universal", "one"):
        found = original_of(open_checkpoint(tmp_path / name), present)
        assert found is not None and found.name == "checkpoint-8-w4", name
    newest = leading(present)
    assert newest is not None and newest.name == "checkpoint-8-w4"


def test_a_universal_folder_beside_its_original_is_no_matter_of_a_resume(
    out: Run, caplog: pytest.LogCaptureFixture
) -> None:
    offered = [offer.checkpoint.name for offer in Offers(out.path)]
    assert offered[0] == "checkpoint-8" and "checkpoint-8_universal" not in offered
    assert "universal" not in caplog.text

    alone = out.path.with_name("alone")
    alone.mkdir()
    shutil.move(out.path / "checkpoint-8_universal", alone)
    with pytest.raises(CheckpointError, match="universal"):
        ckpt.find(alone)


@pytest.mark.parametrize("fits", [True, False])
def test_manifests_of_older_versions_say_only_of_which_save(tmp_path: Path, fits: bool) -> None:
    original = saved(tmp_path)
    assert original.manifest is not None
    command("reshard", original.folder, "--world-size", "4")
    path = tmp_path / "checkpoint-8-w4/manifest.json"
    document = json.loads(path.read_text())
    del document["source"], document["digest"]
    if not fits:
        document["made_of"] = "ab" * 16
    path.write_text(json.dumps(document))
    made = open_checkpoint(path.parent)
    assert made.committed and made.origin == "resharded from another checkpoint"
    assert (original_of(made, [original]) is not None) is fits


@pytest.mark.parametrize(
    "value",
    [
        *({"form": "copied"}, {"name": "x"}, [], "checkpoint-8", {"form": "resharded", "step": -1}),
        {"form": "resharded", "name": "../checkpoint-8"},
        {"form": "resharded", "save": "no hex"},
    ],
)
def test_a_source_that_cannot_be_one_is_damage(value: object, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    path = checkpoint.folder / "manifest.json"
    document = json.loads(path.read_text())
    del document["digest"]
    path.write_text(json.dumps(document | {"source": value}))
    with pytest.raises(CheckpointError, match="damaged"):
        manifest.read(checkpoint.folder)

    (tmp_path / filenames.REWRITING).write_text(json.dumps({"format": 1, "source": value}))
    assert ancestry.record_in(tmp_path) is None


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Record(Ancestry("resharded", "ckpt-\udcff", "ab" * 16, 8, 4, 2), 3, 1)
    path = tmp_path / filenames.REWRITING
    path.write_bytes(record.dumps())
    assert ancestry.record_in(tmp_path) == record
    path.write_bytes(record.dumps()[:40])
    assert ancestry.record_in(tmp_path) is None
    path.write_text("[]")
    assert ancestry.record_in(tmp_path) is None

    sealed = Manifest(2, "tag", "full", "cd" * 16, 1.0, 2, 2, source=record.source)
    assert manifest.loads(sealed.dumps(), path).source == record.source


@pytest.mark.parametrize(("ranks", "name"), [(1, "checkpoint-2-w1"), (2, "checkpoint-2")])
def test_a_step_without_a_manifest_means_what_fits_the_training(
    ranks: int, name: str, tmp_path: Path
) -> None:
    """As a callback asks for it, which the Trainer does not tell what it loads."""
    stock(tmp_path)
    command("reshard", tmp_path / "checkpoint-2", "--world-size", "1")
    assert target.interpret(tmp_path, "2", Topology(2, ranks).fits) == ("checkpoint", name)
    assert target.interpret(tmp_path, "2", None) == ("checkpoint", "checkpoint-2")


def test_doctor_has_nothing_against_one_whose_original_was_slimmed_since(tmp_path: Path) -> None:
    folder = saved(tmp_path).folder
    command("reshard", folder, "--world-size", "1")
    command("reshard", folder, "--world-size", "4")
    command("slim", folder, "--force")
    run = Run(tmp_path)
    mend(run)
    assert diagnose(run).findings == ()


def test_weights_made_beside_the_checkpoints_are_listed_and_never_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path)
    command("to-fp32", tmp_path / "checkpoint-2")
    (tmp_path / "notes").mkdir()
    told = rows(tmp_path, capsys)
    assert list(told) == ["checkpoint-2-fp32", "checkpoint-2"]  # the newest is the last
    assert told["checkpoint-2-fp32"]["step"] == 2
    assert told["checkpoint-2-fp32"]["origin"] == "weights made from global_step2 of step 2"
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-2")

    command("ls", tmp_path / "checkpoint-2")
    command("ls", tmp_path / "checkpoint-2-fp32", code=1)


def test_what_is_made_for_another_trainer_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights alone, and states that the trainer of the run could not load."""
    weights = tmp_path / "weights"
    for step in (2, 4):
        stock_checkpoints.trainers(weights / f"checkpoint-{step}", step)
    command("to-dcp", weights / "checkpoint-4")
    assert "weights alone are written" in capsys.readouterr().err
    shutil.rmtree(weights / "checkpoint-4")
    assert rows(weights, capsys)["checkpoint-4-dcp"]["tier"] == "weights"

    states = tmp_path / "states"
    for step in (2, 4):
        stock_checkpoints.stock(states, step)
    command("to-dcp", states / "checkpoint-4")
    shutil.rmtree(states / "checkpoint-4")
    assert rows(states, capsys)["checkpoint-4-dcp"]["tier"] == "full"
    for run in (weights, states):
        assert ckpt.find(run) == str(run / "checkpoint-2")

    command("doctor", states)
    said = capsys.readouterr().err
    assert "checkpoint-4-dcp is complete, and a resume of this run passes over it" in said
    assert "checkpoint-4-dcp" not in said.partition("a resume takes it as it is")[2]
    shutil.rmtree(states / "checkpoint-2")  # nothing says any more who saves here
    assert ckpt.find(states) == str(states / "checkpoint-4-dcp")
