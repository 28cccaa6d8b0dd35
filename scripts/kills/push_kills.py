"""Kills `ckpt push` at random moments; each time the repository must be as before or as after.

A model is on main. A push of other weights is started and killed (SIGKILL) at a random moment of
the time that a whole push takes. Then the server's own files say what the branch holds: every
digest of the first model, or every digest of the second. The same push again completes it. *kept*
are shards that this second push did not send, since the Hub had them; *aside* counts the kills that
left BRANCH.ckpt-partial behind, which the second push removed.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

REPOSITORY = Path(__file__).resolve().parents[2]
_IMPORTED = ("", "tests/support", "scripts/bench")
sys.path[:0] = [str(REPOSITORY / folder) for folder in _IMPORTED]
from bench import build, ckpt  # noqa: E402
from hub_server import Hub, hub  # noqa: E402

from ckpt.hub.commit import PARTIAL  # noqa: E402

REPO = "org/model"


def held(server: Hub, revision: str) -> dict[str, str]:
    """The digests of a revision's files, computed by the server from their bytes."""
    if revision not in server.branches(REPO):
        return {}
    return {name: digest for name, (_, digest) in server.files(REPO, revision).items()}


def push(env: dict[str, str], folder: Path, args: list[str]) -> subprocess.Popen[bytes]:
    """Starts a push."""
    return subprocess.Popen(
        ckpt("push", folder / "checkpoint-1", REPO, "--uncommitted", "--json", *args),
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen[bytes]) -> dict:
    """Its facts; fails if it did."""
    out, _ = process.communicate(timeout=300)
    if process.returncode:
        raise click.ClickException(f"a push ended with {process.returncode}")
    return json.loads(out)


def once(work: Path, env: dict[str, str], server: Hub, branch: str, wait: float) -> Counter[str]:
    """One kill ``wait`` seconds after the start, what was there then, and the push that follows."""
    said: Counter[str] = Counter()
    other = ["--max-shard-size", "10MB"] + (["--revision", branch] if branch != "main" else [])
    before, old = held(server, branch), set(server.branches(REPO))
    process = push(env, work, other)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    between, branches = held(server, branch), set(server.branches(REPO))
    facts = finish(push(env, work, other))
    after = held(server, branch)
    said["after" if between == after else "before" if between == before else "NEITHER"] += 1
    if {f["name"]: f["sha256"] for f in facts["files"]}.items() - after.items():
        said["INCOMPLETE"] += 1
    if branches - old - {branch, branch + PARTIAL} or set(server.branches(REPO)) - old - {branch}:
        said["STRAY BRANCH"] += 1
    said["left aside"] += branch + PARTIAL in branches
    shards = [f for f in facts["files"] if f["name"].endswith(".safetensors")]
    said["kept"] += sum(f["status"] != "sent" for f in shards)
    said["shards"] += len(shards)
    return said


def rounds(folder: Path, kills: int, new: bool, lfs: bool, seed: int, gb: float) -> Counter[str]:
    """What was there after each kill, counted. ``new``: into a branch that is not there yet."""
    said: Counter[str] = Counter()
    chance = random.Random(seed)
    build(folder / "checkpoint-1", 3, gb)
    more = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_DISABLE_XET": "1" if lfs else "0"}
    with hub(folder / "template") as server:  # a model is there: other weights, in one file
        finish(push(server.env() | more, folder, ["--dtype", "bf16"]))
    whole = 60.0
    for number in range(kills + 1):  # the first is not killed, but timed
        with tempfile.TemporaryDirectory(dir=folder) as name:
            shutil.copytree(folder / "template", Path(name) / "hub")
            with hub(Path(name) / "hub") as server:
                env = server.env() | more | {"XDG_CACHE_HOME": f"{name}/cache"}
                wait = chance.uniform(0.25, 1.0) * whole if number else whole
                start = time.monotonic()
                found = once(folder, env, server, "step-1" if new else "main", wait)
                if number:
                    said += found
                else:
                    whole = 0.6 * (time.monotonic() - start)  # the second of two has little to do
    return said


@click.command()
@click.option("--kills", default=100, show_default=True, help="Kills for each way.")
@click.option("--gb", default=0.05, show_default=True, help="GB of fp32 weights, near enough.")
@click.option("--seed", default=1, show_default=True)
@click.option("--way", default="all", type=click.Choice(["all", "xet", "lfs", "new"]))
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work.")
def main(kills: int, gb: float, seed: int, way: str, folder: Path | None) -> None:
    """Kill pushes and print a table; exit code 1 if the repository was ever anything else."""
    names = {"xet": (False, False), "lfs": (False, True), "new": (True, False)}
    bad = False
    click.echo("| push | kills | before | after | neither | shards kept | aside |")
    click.echo("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (new, lfs) in names.items():
        if way not in ("all", name):
            continue
        with tempfile.TemporaryDirectory(prefix="push-kills-", dir=folder) as work:
            said = rounds(Path(work), kills, new, lfs, seed, gb)
        odd = {key: count for key, count in said.items() if key.isupper()}
        bad = bad or bool(odd)
        what = {"xet": "main, Xet", "lfs": "main, LFS", "new": "a new branch, Xet"}[name]
        click.echo(
            f"| {what} | {kills} | {said['before']} | {said['after']} | {odd or 0} | "
            f"{said['kept']} of {said['shards']} | {said['left aside']} |"
        )
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
