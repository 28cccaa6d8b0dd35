"""Several engines of one training, saved in one commit and resumed together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from engines_worker import SPECS
from oracles import convert, run, same, torchrun, weights_in

from ckpt.runs import engines, manifest
from ckpt.runs.run import Run, open_checkpoint
from ckpt.runs.upkeep import amending, doctor, findings, slim
from ckpt.runs.verify import verify
from ckpt.saving.engines import Engines
from converters.errors import CheckpointError
from converters.zero import checkpoint

WORKER = "tests/workers/engines_worker.py"
LIMIT = 900  # seconds; it takes 20, and minutes more where an extension is compiled


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the worker saved; it asserts that losses and values are those without any save, and
    after resuming those without an interruption."""
    out = tmp_path_factory.mktemp("engines")
    torchrun(WORKER, out, limit=LIMIT)
    return out


def test_both_are_in_one_checkpoint_that_every_tool_takes_for_one(saved: Path) -> None:
    for which in ("fore", "back"):
        found = Run(saved / which).checkpoints()
        assert [c.name for c in found] == ["checkpoint-2", "weights-3"][: len(found)]
        held = found[0].manifest
        assert held is not None and held.tag == "actor/global_step2" and held.stage == 3
        assert engines.names(held) == ("actor", "critic")
        assert manifest.check(found[0].folder, held, data=True) == []
        files = {p.relative_to(found[0].folder).as_posix() for p in found[0].folder.rglob("*")}
        assert {*held.files} == {n for n in files if (found[0].folder / n).is_file()} - {
            "manifest.json"
        }
        verdict = verify(found[0])
        assert verdict.whole and [line.split(":")[0] for line in verdict.proven[1:]] == [*SPECS]
        run("verify", saved / which, "--data")
        run("ls", saved / which)
        run("doctor", saved / which)
        assert (saved / which / "latest").read_text() == "checkpoint-2/actor/global_step2"
        assert not (found[0].folder / "latest").exists()
        for name, spec in SPECS.items():
            assert (found[0].folder / name / "latest").read_text() == "global_step2"
            assert checkpoint.read(found[0].folder / name).stage == spec.stage
    with pytest.raises(CheckpointError, match="holds the checkpoints actor, critic"):
        checkpoint.read(saved / "fore/checkpoint-2")


@pytest.mark.parametrize("name", SPECS)
def test_each_folder_is_a_checkpoint_of_its_engine(name: str, saved: Path, tmp_path: Path) -> None:
    ours = convert(saved / "fore/checkpoint-2" / name, tmp_path / "ours")
    theirs = convert(saved / "stock" / name, tmp_path / "stock")
    assert ours.keys() == theirs.keys()
    assert all(same(ours[key], value) for key, value in theirs.items())
    for folder in (saved / "fore/checkpoint-2", saved / "back/checkpoint-2"):
        low = weights_in(folder / name)
        assert low and all(same(value, ours[key].to(value.dtype)) for key, value in low.items())
    assert weights_in(saved / "back/weights-3" / name).keys() == low.keys()
    high = weights_in(saved / "tight/checkpoint-3" / name)
    whole = convert(saved / "tight/checkpoint-3" / name, tmp_path / "whole")
    assert high and all(same(value, whole[key]) for key, value in high.items())


def test_what_fails_for_one_of_them_is_told(saved: Path) -> None:
    for rank in (0, 1):
        told = json.loads((saved / f"told{rank}.json").read_text())
        for name in SPECS:
            assert told[f"save {name}"] == f"save failed on rank 1: RuntimeError: no {name} today"
        assert "engine 'a/b': its name becomes a folder" in told["name"]
        assert "has the engines actor, critic, resume was given actor, judge" in told["others"]
        assert "has the engines actor, critic, resume was given one" in told["one"]
        assert "is of one engine without a name, resume was given actor, critic" in told["single"]
        assert "with ZeRO stage 3, this training has 2 with stage 2 for actor" in told["stages"]
    assert [c.name for c in Run(saved / "fails").checkpoints()] == ["checkpoint-5"]


def test_it_is_mended_and_slimmed_as_a_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "QUIET", 0)
    folder = saved / "back/checkpoint-2"
    there = open_checkpoint(folder)
    assert there.manifest is not None
    states = [name for name in there.manifest.files if name.startswith("critic/global_step2/")]
    for lost in (*states, "critic/latest", "rng_state_1.state"):
        assert amending.amendment(replace(there, deleted=(lost,))) is None, lost
    spare = amending.amendment(replace(there, deleted=("critic/model.safetensors",)))
    assert spare is not None and "resumable" in spare.what
    (folder / "critic/latest").unlink()
    (finding,) = [
        f
        for f in doctor.diagnose(Run(saved / "back")).findings
        if f.path.name == "latest" and f.path.parent.name == "critic"
    ]
    assert finding.path == folder / "critic/latest" and finding.mend is not None
    finding.mend()
    run("verify", folder)
    slimming = slim.plan(open_checkpoint(folder), force=True)
    slim.execute(slimming)
    slimmed = open_checkpoint(folder)
    assert slimmed.committed and slimmed.tier == "weights"
    names = {path.name for path in folder.rglob("*")}
    assert not {"latest", "global_step2", "zero_to_fp32.py"} & names
    assert weights_in(folder / "actor") and weights_in(folder / "critic")
    assert slim.leftovers(slimmed) == []


def test_names_of_engines_are_names_of_folders() -> None:
    assert Engines({"actor": 1, "critic": 2}).tag(5) == "actor/global_step5"
    assert Engines(7).tag(5) == "global_step5" and Engines(7).names == ()
    for wrong in ("", "a/b", "..", "global_step5", "checkpoint-5", "latest", ".x"):
        with pytest.raises(CheckpointError, match="its name becomes a folder"):
            Engines({wrong: 1})
    with pytest.raises(CheckpointError, match="no engine was given"):
        Engines({})


def test_a_manifest_that_names_no_engines_is_of_one() -> None:
    plain = manifest.Manifest(5, "global_step5", "full", "0" * 8, 1.0, 2, 1)
    assert engines.tags(plain) == {"": "global_step5"}
    assert engines.pointers("global_step5", ()) == {"latest": "global_step5"}
    hostile = replace(plain, progress={"engines": {"../up": {}, "/root": {}}})
    assert engines.names(hostile) == ()
    assert engines.tags(replace(plain, progress={"engines": 3})) == {"": "global_step5"}
