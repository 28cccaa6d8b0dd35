"""Runs other projects' own tests twice, as they are and with ckpt in the place of what they test.

    python scripts/peers/run_peers.py picklescan --from ~/src/picklescan
    python scripts/peers/run_peers.py safetensors --from ~/src/safetensors
    python scripts/peers/run_peers.py deepspeed --from ~/src/DeepSpeed --swap save
    python scripts/peers/run_peers.py safetensors --from ~/src/safetensors -k slice --timeout 300

The tests come from a folder that is given (a checkout, or an unpacked source distribution), or
from the source distribution of the installed version, which pip downloads. The source
distributions of DeepSpeed, of safetensors and of picklescan 1.0 cannot serve: the first has no
tests, pip needs a compiler of Rust for the second, and the third lacks the files that its tests
scan. Clone these at the tag of the installed version; tests of another version fail for reasons
of their own.

The tests are copied to a temporary folder and run there by pytest. What passes as it is, and not
with ckpt, is listed; the exit code is 1 if anything is, but for what differs by design. A case
that fails for a reason of ours becomes a test in tests/. Not a part of CI: other people's tests
are not in this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Peer:
    """A project whose tests are run.

    ``folder`` is where its tests lie in its sources, ``targets`` what pytest is given
    there, ``swaps`` the names of what may be swapped, ``plugin`` the module that swaps;
    where there is none the targets are tests of ours on the project's files.
    """

    package: str
    folder: str
    targets: tuple[str, ...]
    plugin: str | None
    swaps: tuple[str, ...]


_OWN_METADATA = "our writer writes its own metadata, {'format': 'pt'}"
_OWN_ARGUMENTS = "what save_file says of its arguments is not a part of our writer"
# Tests that have to fail: by package, swap and name.
DIFFERENCES = {
    ("safetensors", "open", "WindowsTestCase::test_get_correctly_dropped"): "what is opened can be "
    "read after its block, too: no file stays open",
    ("safetensors", "open", "ReadmeTestCase::test_numpy_slice"): "an index that is out of bounds "
    "is numpy's IndexError, and lists of numbers are taken",
    ("safetensors", "save", "TestCase::test_serialization"): _OWN_METADATA,
    ("safetensors", "save", "TorchTestCase::test_serialization"): _OWN_METADATA,
    ("safetensors", "save", "TorchModelTestCase::test_save"): _OWN_METADATA,
    ("safetensors", "save", "TorchModelTestCase::test_workaround"): _OWN_METADATA,
    ("safetensors", "save", "PreadBackendTests::test_safe_open_round_trip"): _OWN_METADATA,
    ("safetensors", "save", "TorchTestCase::test_bogus"): _OWN_ARGUMENTS,
    ("safetensors", "save", "TorchTestCase::test_meta_tensor"): _OWN_ARGUMENTS,
    ("safetensors", "save", "TorchTestCase::test_sparse"): _OWN_ARGUMENTS,
    ("safetensors", "save", "TorchModelTestCase::test_failure"): _OWN_ARGUMENTS,
    ("safetensors", "save", "TorchModelTestCase::test_workaround_non_contiguous"): _OWN_ARGUMENTS,
}

PEERS = {
    "safetensors": Peer(
        package="safetensors",
        folder="bindings/python/tests",
        targets=(
            *("test_simple.py", "test_pt_comparison.py", "test_pt_model.py"),
            *("test_pread_backend.py", "test_threadable.py"),
        ),
        plugin="swap_safetensors",
        swaps=("open", "save"),
    ),
    "deepspeed": Peer(
        package="deepspeed",
        folder="tests",
        targets=("unit/checkpoint",),
        plugin="swap_deepspeed",
        swaps=("functions", "save", "load"),
    ),
    "picklescan": Peer(
        package="picklescan",
        folder="tests",
        targets=(str(HERE / "malicious_files.py"),),
        plugin=None,
        swaps=("readers",),
    ),
}


def main() -> None:
    """Runs the tests of one project and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--from", dest="source", type=Path, help="a folder with its sources")
    parser.add_argument("--swap", help="what to swap; by default each in turn")
    parser.add_argument("-k", dest="expression", help="only the tests that pytest -k chooses")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a run")
    options = parser.parse_args()
    peer = PEERS[options.peer]
    with tempfile.TemporaryDirectory() as scratch:
        folder = tests_of(peer, options.source, Path(scratch))
        stock = {} if peer.plugin is None else run(peer, folder, None, options)
        is_worse = False
        for swap in [options.swap] if options.swap else peer.swaps:
            is_worse |= report(peer, swap, stock, run(peer, folder, swap, options))

    sys.exit(1 if is_worse else 0)


def tests_of(peer: Peer, source: Path | None, scratch: Path) -> Path:
    """A copy of the folder of tests; exits with a sentence where there is none."""
    if source is None:
        source = downloaded(peer, scratch / "sdist")
    folder = source / peer.folder
    if not folder.is_dir():
        sys.exit(
            f"{source} has no folder {peer.folder}: clone {peer.package} "
            f"{version_of(peer)} and name it with --from"
        )

    if peer.plugin is None and all(path.suffix == ".py" for path in files_below(folder)):
        sys.exit(
            f"{folder} has none of the files that are opened: clone {peer.package} and name it "
            "with --from"
        )

    warn_of_version(peer, source)
    return shutil.copytree(folder, scratch / "tests")


def files_below(folder: Path) -> list[Path]:
    """All files in a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def warn_of_version(peer: Peer, source: Path) -> None:
    """Says on stderr that the tests are of another version than what is installed.

    Then tests ask for attributes that are not there, and fail as they are.
    """
    path = source / "version.txt"
    stated = path.read_text().strip() if path.is_file() else version_of(peer)
    if stated != version_of(peer):
        print(
            f"{peer.package}: the tests are of {stated}, and {version_of(peer)} is installed",
            file=sys.stderr,
        )


def version_of(peer: Peer) -> str:
    """The version that is installed; empty where none is."""
    try:
        return version(peer.package)
    except ModuleNotFoundError:
        return ""


def downloaded(peer: Peer, folder: Path) -> Path:
    """The unpacked source distribution; exits with a sentence where pip gets none."""
    wanted = f"{peer.package}=={version_of(peer)}" if version_of(peer) else peer.package
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "-q", "-d", str(folder), wanted]
    if subprocess.run(command).returncode:
        sys.exit(f"pip has no source distribution of {wanted} for this machine; use --from")

    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def run(peer: Peer, folder: Path, swap: str | None, options: argparse.Namespace) -> dict[str, str]:
    """Outcomes by test: passed, failed, skipped; ``swap`` is what ckpt takes the place of.

    A run that takes longer than ``--timeout`` is stopped, and what came before counts.
    """
    lines = folder.with_name("outcomes.jsonl")
    lines.write_text("")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "outcome_lines", *(["-p", peer.plugin] if peer.plugin else [])]
    command += ["-k", options.expression] if options.expression else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), str(folder)]),
        "PEERS_SWAP": swap or "",
        "PEERS_FOLDER": str(folder),
        "PEERS_OUTCOMES": str(lines),
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "4",  # the ranks that DeepSpeed's tests believe to have room for
    }
    # a version may lack some of them
    targets = [name for name in peer.targets if (folder / name).exists()]
    process = subprocess.Popen(
        [*command, *targets],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that its ranks end with it
    )
    try:
        process.wait(options.timeout)
    except subprocess.TimeoutExpired:
        print(f"{peer.package}: stopped after {options.timeout:.0f} s", file=sys.stderr)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    results = outcomes(lines)
    if not results:
        sys.exit(f"no test of {peer.package} came to an end: {' '.join([*command, *targets])}")
    return results


def outcomes(path: Path) -> dict[str, str]:
    """The outcome of every test, as ``outcome_lines`` wrote them."""
    results: dict[str, str] = {}
    for line in path.read_text().splitlines():
        case = json.loads(line)
        message = f": {case['message']}" if "message" in case else ""
        results[case["name"]] = case["outcome"] + message

    return results


def report(peer: Peer, swap: str, stock: dict[str, str], ours: dict[str, str]) -> bool:
    """Prints what ckpt does otherwise; whether anything of that is not by design.

    A test that was not run, as the time was up, is counted for itself, and proves nothing.
    """
    wanted = [name for name, outcome in (stock or ours).items() if outcome == "passed"]
    if peer.plugin is None:
        wanted = list(ours)
    elif not wanted:
        print(f"{peer.package}: none of {len(stock)} tests passes as it is", file=sys.stderr)

    run_names = [name for name in wanted if name in ours]
    good = [name for name in run_names if ours[name] == "passed"]
    missed = f", {len(wanted) - len(run_names)} more were not run" if run_names != wanted else ""
    head = f"{peer.package} {version_of(peer)}, {swap} by ckpt"
    print(f"{head}: {len(good)} of {len(run_names)} pass{missed}")
    unexplained = 0
    for name in wanted:
        if name in good:
            continue

        reason = DIFFERENCES.get((peer.package, swap, name.partition("::")[2]))
        unexplained += reason is None
        print(f"  {name}\n    {ours.get(name, 'not run')}")
        if reason is not None:
            print(f"    by design: {reason}")

    return bool(unexplained) or not wanted


if __name__ == "__main__":
    main()
