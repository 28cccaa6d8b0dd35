"""Commands that change folders, each with the folder that it is run on: real, small checkpoints.

BASE/source/    what is only read, where there is such a thing
BASE/live/      what is changed: a run, or the folder that an output is made in
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from oracles import FIXTURES
from run_folders import SOURCE, commit, real

from ckpt.cli.main import main
from ckpt.runs.run import Run

OUTPUT = "out"


@dataclass(frozen=True, slots=True)
class Scene:
    """A command: ``build`` makes what it is run on, ``args`` are its words.

    ``output``: it makes that folder in live and touches nothing else there; else live is a run.
    ``changes``: it is not there only to look.
    """

    name: str
    build: Callable[[Path], object]
    args: Callable[[Path], list[object]]
    output: bool = False
    changes: bool = True


def called(*args: object) -> tuple[int, str]:
    """Runs ``ckpt`` in this process; its exit code and what it said on stderr."""
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(StringIO()):
        try:
            main([str(arg) for arg in args])
        except SystemExit as done:
            return int(done.code or 0), said.getvalue()
    return 0, said.getvalue()


def _light(run: Path, step: int, loss: float = 1.0) -> None:
    """A committed checkpoint with what its checks need and no more."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("config.json", "latest", "model.safetensors", "trainer_state.json"):
        shutil.copy(SOURCE / name, folder / name)
    shutil.copytree(SOURCE / "global_step2", folder / "global_step2")
    commit(folder, step, {"eval_loss": loss}, save=f"{step:032x}")


def _source(base: Path) -> None:
    real(base / "source", 2)
    (base / "live").mkdir()


def _few(base: Path) -> None:
    """One of eleven parameters, for what makes files of each of them."""
    shutil.copytree(FIXTURES / "corpus/hf2/checkpoint-2", base / "source/checkpoint-2")
    commit(base / "source/checkpoint-2", 2)
    (base / "live").mkdir()


def _replaced(base: Path) -> None:
    _source(base)
    code, said = called("to-fp32", base / "source/checkpoint-2", "-o", base / "live" / OUTPUT)
    assert code == 0, said


def _run(base: Path, *steps: int) -> Run:
    (base / "source").mkdir()
    for step in steps:
        _light(base / "live", step, 10.0 - step)
    run = Run(base / "live")
    run.point("latest", run.newest())
    run.point("best", run.newest())
    return run


def _parts(base: Path) -> None:
    """A save of two nodes: each has its rank's states; node 0 is in live."""
    for node, run in enumerate((base / "live", base / "source")):
        folder = run / "checkpoint-2"
        shutil.copytree(SOURCE, folder)
        (folder / f"global_step2/bf16_zero_pp_rank_{1 - node}_mp_rank_00_optim_states.pt").unlink()
        for name in ["latest", "model.safetensors"] if node else []:
            (folder / name).unlink()
        commit(folder, 2, node=node, nodes=2, save="ab" * 16)


def _apart(base: Path) -> None:
    _parts(base)
    shutil.move(base / "live/checkpoint-2", base / "source/checkpoint-2-node0")


def _sick(base: Path) -> None:
    """What several crashes may leave of a run."""
    run = _run(base, 2, 4, 6)
    live = run.path
    shutil.copytree(live / "checkpoint-6", live / ".checkpoint-8.saving")
    (live / ".checkpoint-8.saving/manifest.json").unlink()
    (live / ".checkpoint-8.saving/.lock").write_bytes(b"")
    shutil.copytree(live / "checkpoint-2/global_step2", live / ".checkpoint-1.trash/global_step1")
    shutil.copytree(live / "checkpoint-6", live / "checkpoint-7")
    (live / "checkpoint-7/manifest.json").unlink()
    for path in (live / "checkpoint-7/global_step2").glob("*optim*"):
        path.write_bytes(path.read_bytes()[:1000])
    shutil.copytree(live / "checkpoint-2/global_step2", base / "source/tag")
    code, said = called("slim", live / "checkpoint-2")
    assert code == 0, said
    shutil.move(base / "source/tag", live / "checkpoint-2/global_step2")
    (live / "latest").write_text("checkpoint-7/global_step2")
    (live / "best").unlink()
    (live / "checkpoint-4/latest").write_text("nowhere")
    (live / "checkpoint-6/model.safetensors.partial").write_bytes(b"cut")


def scenes() -> Iterator[Scene]:
    """All that change something."""
    shards = ["--max-shard-size", "6KB", "--workers", 2]
    yield Scene("to-fp32", _source, lambda b: _convert(b, *shards), True)
    yield Scene("to-fp32 bin", _source, lambda b: _convert(b, "--format", "bin"), True)
    yield Scene("to-fp32 overwrite", _replaced, lambda b: _convert(b, *shards, "--overwrite"), True)
    yield Scene("reshard", _source, lambda b: _reshard(b, 3), True)
    yield Scene("reshard stage", _source, lambda b: _reshard(b, 1, "--stage", 3), True)
    yield Scene("to-universal", _few, _universal, True)
    yield Scene("from-universal", _from_universal, _native, True)
    yield Scene("to-dcp", _few, _dcp, True)
    yield Scene("from-dcp", _from_dcp, _native_of_dcp, True)
    yield Scene("prune", _four, lambda b: ["prune", b / "live", "--keep-last", 1])
    yield Scene("slim", _two, lambda b: ["slim", b / "live/checkpoint-2"])
    yield Scene("slim newest", _two, lambda b: ["slim", "--force", b / "live/checkpoint-4"])
    yield Scene("collect", _apart, _collect_apart, True)
    yield Scene("collect inside", _parts, _collect)
    yield Scene("latest --set", _two, lambda b: ["latest", b / "live", *_OTHER])
    yield Scene("best --set", _two, lambda b: ["latest", b / "live", "--best", *_OTHER])
    yield Scene("doctor --fix", _sick, lambda b: ["doctor", b / "live", "--fix"])


def marking() -> Iterator[Scene]:
    """Those that change a mark of no length: too little to cut it short in many ways."""
    yield Scene("pin", _two, lambda b: ["pin", b / "live/checkpoint-2"])
    yield Scene("unpin", _pinned, lambda b: ["unpin", b / "live/checkpoint-2"])


def looking() -> Iterator[Scene]:
    """Those that change nothing."""
    for words in (["verify", "--data"], ["verify"], ["ls"], ["latest"]):
        yield Scene(" ".join(words), _two, lambda b, w=words: [*w, b / "live"], changes=False)
    for words in (["show"], ["to-fp32", "--dry-run"]):
        yield Scene(
            " ".join(words),
            _source,
            lambda b, w=words: [*w, b / "source/checkpoint-2"],
            changes=False,
        )


_OTHER = ("--set", "checkpoint-2")


def _two(base: Path) -> Run:
    return _run(base, 2, 4)


def _pinned(base: Path) -> None:
    _two(base)
    code, said = called("pin", base / "live/checkpoint-2")
    assert code == 0, said


def _four(base: Path) -> Run:
    return _run(base, 2, 4, 6, 8)


def _convert(base: Path, *more: object) -> list[object]:
    return ["to-fp32", base / "source/checkpoint-2", "-o", base / "live" / OUTPUT, *more]


def _universal(base: Path) -> list[object]:
    return ["to-universal", base / "source/checkpoint-2", "-o", base / "live" / OUTPUT]


def _from_universal(base: Path) -> None:
    _few(base)
    made = base / "source/universal"
    code, said = called("to-universal", base / "source/checkpoint-2", "-o", made)
    assert code == 0, said


def _native(base: Path) -> list[object]:
    made = ["from-universal", base / "source/universal", "-o", base / "live" / OUTPUT]
    return [*made, "--world-size", 2]


def _dcp(base: Path) -> list[object]:
    made = ["to-dcp", base / "source/checkpoint-2", "-o", base / "live" / OUTPUT]
    return [*made, "--layout", "accelerate"]


def _from_dcp(base: Path) -> None:
    _few(base)
    made = base / "source/dcp"
    code, said = called("to-dcp", base / "source/checkpoint-2", "-o", made)
    assert code == 0, said


def _native_of_dcp(base: Path) -> list[object]:
    made = ["from-dcp", base / "source/dcp", "-o", base / "live" / OUTPUT]
    return [*made, "--world-size", 2, "--stage", 2]


def _reshard(base: Path, ranks: int, *more: object) -> list[object]:
    made = ["reshard", base / "source/checkpoint-2", "-o", base / "live" / OUTPUT]
    return [*made, "--world-size", ranks, *more]


def _collect_apart(base: Path) -> list[object]:
    source = base / "source"
    parts = [source / "checkpoint-2-node0", source / "checkpoint-2"]
    return ["collect", *parts, "-o", base / "live" / OUTPUT]


def _collect(base: Path) -> list[object]:
    inside = base / "live/checkpoint-2"
    return ["collect", inside, base / "source/checkpoint-2", "-o", inside]
