"""The local Hub, put back quickly to what it held, and ``ckpt`` as forks that know it.

    with online(folder) as hub:
        ended = hub.forks[XET].run(["push", checkpoint, MODEL], folder)
        hub.held()      digests, computed from the server's own bytes
        hub.restore()   everything that came since is gone, on the server and at the client

``MODEL`` holds weights in bf16 and one file, ``SHARDS`` in fp16 and several, ``STATE`` a training
state of another run: the Hub has nothing of fp32 shards, or of the state, of ``lean``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from faults.forks import Ended, Forks
from hub_clients import ZERO3
from hub_server import Hub, hub
from run_folders import SOURCE, commit

MODEL, SHARDS, STATE = "org/model", "org/shards", "org/state"
XET, LFS = "xet", "lfs"
SHARD = ("--max-shard-size", "12KB")  # of a push of the real checkpoint: several shards
LEFT_OUT = ("tokenizer_config.json", "training_args.bin", "rng_state_1.pth", "scheduler.pt", "gen*")
IMPORTED = (
    "ckpt.hub.push",
    "ckpt.hub.pull",
    "ckpt.hub.select",
    "huggingface_hub.hf_api",
    "huggingface_hub._commit_api",
    "huggingface_hub._snapshot_download",
    "huggingface_hub.lfs",
    "huggingface_hub.utils._xet",
)


@dataclass(frozen=True, slots=True)
class Online:
    """The server, what it is put back to, and a warm process for each way (``XET``, ``LFS``)."""

    server: Hub
    kept: Path
    client: Path
    forks: Mapping[str, Forks]

    def held(self, repo: str = MODEL) -> dict[str, str]:
        """Names and digests of what main holds."""
        return {name: digest for name, (_, digest) in self.server.files(repo).items()}

    def restore(self, contents: bool = True) -> None:
        """Puts everything back; without ``contents`` bytes that came stay, on no branch."""
        folder = self.server.folder
        shutil.rmtree(folder / "repos")
        shutil.copytree(self.kept / "repos", folder / "repos")
        shutil.rmtree(self.client, ignore_errors=True)
        if not contents:
            return
        for name in ("blobs", "cas", "parts"):
            for path in list((folder / name).rglob("*")):
                kept = self.kept / path.relative_to(folder)
                if path.is_file() and not kept.exists():
                    path.unlink()
        self.server.reread()


def lean(run: Path, source: Path = SOURCE) -> Path:
    """A committed copy of a Trainer's checkpoint, with fewer of the files of each kind."""
    folder = run / "checkpoint-2"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return commit(folder, 2).folder


@contextmanager
def online(folder: Path) -> Iterator[Online]:
    """Everything below ``folder``, for as long as the block lasts."""
    client = folder / "client"
    with hub(folder / "hub", part_size=4000, multipart_over=8000) as server:
        env = server.env() | {"HF_HOME": str(client), "HF_XET_CACHE": str(client / "xet")}
        env |= {"HOME": str(client), "XDG_CACHE_HOME": str(client / "cache")}
        with (
            Forks(env | {"HF_HUB_DISABLE_XET": "0"}, IMPORTED) as xet,
            Forks(env | {"HF_HUB_DISABLE_XET": "1"}, IMPORTED) as lfs,
        ):
            made = Online(server, folder / "kept", client, {XET: xet, LFS: lfs})
            checkpoint = lean(folder / "source")
            _push(made, checkpoint, MODEL, "--dtype", "bf16")
            _push(made, checkpoint, SHARDS, "--dtype", "fp16", "--max-shard-size", "6KB")
            _push(made, lean(folder / "other", ZERO3), STATE, "--include-training-state")
            shutil.copytree(server.folder, made.kept)
            yield made


def _push(made: Online, checkpoint: Path, repo: str, *more: str) -> Ended:
    ended = made.forks[XET].run(["push", checkpoint, repo, *more], checkpoint)
    if ended.status:
        raise RuntimeError(f"{repo} was not made: {ended.said}")
    return ended
