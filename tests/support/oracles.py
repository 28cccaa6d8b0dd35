"""What the tests compare with: the live engine's values, and how to run the command."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_ranks
from paths import FIXTURES, PYTHONPATH, ROOT
from safetensors import safe_open
from safetensors.torch import load_file

from ckpt.cli.main import main

SHARED_CORPUS = ROOT.parent / "shared" / "corpus"
REFUSED = {  # by name; these follow later
    "nl2": "node",
}

# read, but not by DeepSpeed's own script, and by nothing that means ZeRO alone
OF_MORE_THAN_ZERO = ("aep_z3", "mics4", "moe_s2", "pp_z1bf", "tp_z2_w4")


def made() -> list[Path]:
    """The fixtures of scripts/fixtures/make_fixtures.py that are folders."""
    return sorted(p for p in FIXTURES.iterdir() if p.is_dir() and p.name.startswith("zero"))


def corpus() -> list[Path]:
    """The real checkpoints of 14 versions of DeepSpeed that can be converted."""
    left_out = {*REFUSED, *OF_MORE_THAN_ZERO}
    return sorted(p for p in (FIXTURES / "corpus").iterdir() if p.name not in left_out)


def root_of(save_dir: Path) -> Path:
    """The folder to convert: a Trainer's checkpoint-2 where there is one."""
    inner = save_dir / "checkpoint-2"
    return inner if inner.is_dir() else save_dir


def live(save_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What the engine held when it saved: by kind (fp32, live, buffer, exp_avg, ...) and name."""
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    path = save_dir / "live.safetensors"
    if path.is_file():
        for key, value in load_file(path).items():
            kind, _, name = key.partition("/")
            kinds.setdefault(kind, {})[name] = value
    return kinds


def run(*args: Any, code: int = 0) -> None:
    """Runs ``ckpt`` in this process and checks its exit code."""
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in args])
    assert exit.value.code == code


def torchrun(
    script: str,
    *args: Any,
    ranks: int = 2,
    limit: int = 900,
    code: int = 0,
    fresh: bool = False,
    **environment: str,
) -> str:
    """Runs a worker script as the ranks of one node; returns what it said on stderr.

    They are forks of a process that has imported what trainings import (``warm_ranks``), but with
    ``fresh`` or with CKPT_FRESH_RANKS=1: then torchrun itself starts them.

    ``limit`` is in seconds: DeepSpeed compiles an extension at its first start. Fails unless the
    exit code is ``code``; of torchrun that is 1 whatever its processes end with.
    """
    launch = _launched if fresh or os.environ.get("CKPT_FRESH_RANKS") == "1" else _forked
    out = next((arg for arg in args if isinstance(arg, Path)), None)
    empty = out is not None and out.is_dir() and not any(out.iterdir())
    done = launch(script, args, ranks, limit, environment)
    if done.returncode != code and empty and ABORTED in done.stderr and "[rank" not in done.stderr:
        assert out is not None
        shutil.rmtree(out)
        out.mkdir()
        done = launch(script, args, ranks, limit, environment)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


# What gloo's threads abort with now and then; no rank has failed then. Once more, in that case.
ABORTED = "terminate called without an active exception"


def _forked(
    script: str, args: Sequence[Any], ranks: int, limit: int, environment: dict[str, str]
) -> warm_ranks.Ended:
    return warm_ranks.run(script, args, ranks=ranks, limit=limit, environment=environment)


def _launched(
    script: str, args: Sequence[Any], ranks: int, limit: int, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launcher(script, *args, ranks=ranks, port=free_port()),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
        env=surroundings() | warm_ranks.NOT_COMPILED | forking(script) | environment,
    )


def torchruns(
    script: str, *args: Any, limit: int = 900, fresh: bool = False, **environment: str
) -> None:
    """As ``torchrun`` on two ranks that are a node each: with ``fresh`` by a torchrun for each."""
    if not fresh and os.environ.get("CKPT_FRESH_RANKS") != "1":
        ended = warm_ranks.run(
            script, args, ranks=2, limit=limit, environment=environment, alone=True
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        return
    port, started = free_port(), []
    for node in range(2):
        options = ["--nnodes", "2", "--node_rank", str(node), "--master_addr", "localhost"]
        command = launcher(script, *args, ranks=1, port=port, options=options)
        started.append(
            subprocess.Popen(
                command,
                env=surroundings() | warm_ranks.NOT_COMPILED | forking(script) | environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        _, said = process.communicate(timeout=limit)
        assert process.returncode == 0, said[-3000:]


def free_port() -> int:
    """A port that nobody listens on, and below those that the system gives to connections.

    One of the system's own choice may be in use again before a launcher listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            return port


def launcher(
    script: str, *args: Any, ranks: int, port: int, options: Sequence[str] = ()
) -> list[str]:
    """The command that starts the ranks of one node."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_port", str(port), *options]
    return [*command, str(ROOT / script), *map(str, args)]


def surroundings() -> dict[str, str]:
    """The environment of a worker."""
    return os.environ | {"PYTHONPATH": PYTHONPATH}


def forking(script: str) -> dict[str, str]:
    """What makes a launcher fork the ranks of a script, instead of starting a Python for each.

    Not with CKPT_FRESH_RANKS=1.
    """
    if os.environ.get("CKPT_FRESH_RANKS") == "1":
        return {}
    path = os.pathsep.join([str(ROOT / "tests/support/launched"), PYTHONPATH])
    return {"PYTHONPATH": path, "FORKED_SCRIPT": str(ROOT / script)}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors or .bin shards."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    for path in sorted(folder.glob("*.bin")):
        found |= torch.load(path, weights_only=True, mmap=True)
    return found


def convert(source: Path, folder: Path, *options: Any) -> dict[str, torch.Tensor]:
    """The weights that ``ckpt to-fp32`` makes of a checkpoint."""
    run("to-fp32", source, "-o", folder, *options)
    return weights_in(folder)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def raised(tensor: torch.Tensor) -> torch.Tensor:
    """As fp32 output has it: floating-point values in at least 32 bits."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
