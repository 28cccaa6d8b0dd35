"""A push to the local Hub of the tests and a pull back: ``hub_trial.py CHECKPOINT FOLDER``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hub_server import hub


def main() -> None:
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.copytree(checkpoint, folder / "out/checkpoint-2")
    with hub(folder / "server", part_size=8000, multipart_over=8000) as server:
        environment = os.environ | server.env() | {"XDG_CACHE_HOME": str(folder / "cache")}

        def ckpt(*args: str) -> str:
            command = [sys.executable, "-m", "ckpt", *args]
            done = subprocess.run(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            return done.stdout

        push = ("push", "out/checkpoint-2", "org/model", "--uncommitted", "--verify-download")
        push = (*push, "--max-shard-size", "20KB")
        facts = json.loads(ckpt(*push, "--json"))
        print(f"by {facts['transport']}, {len(facts['files'])} files")
        again = json.loads(ckpt(*push, "--json"))
        assert facts["new_commit"] and not again["new_commit"]
        ckpt("to-fp32", "out/checkpoint-2", "-o", "expected", "--max-shard-size", "20KB")
        ckpt("pull", "org/model", "model")

    for path in (folder / "expected").iterdir():
        if path.name != "conversion.json":
            assert (folder / "model" / path.name).read_bytes() == path.read_bytes(), path.name


if __name__ == "__main__":
    main()
