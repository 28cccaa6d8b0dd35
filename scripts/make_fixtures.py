"""Remake the checkpoints under fixtures/ with real DeepSpeed on CPU.

    python scripts/make_fixtures.py [NAME ...]        # all of them, or the named ones
    python scripts/make_fixtures.py --check           # compare them with DeepSpeed's own reader
    python scripts/make_fixtures.py --corpus ../shared/corpus

Needs deepspeed, transformers, accelerate, tokenizers and safetensors; the NVMe one also needs
libaio's headers. What is made is listed in ``fixture_specs.py``; what is trained and recorded
is in ``fixture_worker.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from fixture_specs import NVME_PATH, SPECS, Spec
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"
MAX_FILE = 600_000
TABLE = ("<!-- table: written by scripts/make_fixtures.py -->", "<!-- end of table -->")
PACKAGES = ("deepspeed", "torch", "transformers", "accelerate", "tokenizers", "safetensors")
# Where DeepSpeed's reader is known to be wrong, or the truth is.
KNOWN = {
    "zero2-zero-sized": "every zero-element parameter is read with the first one's shape",
    "corpus/mics4": "made with mocked streams, so its values mean nothing",
}
# Machine paths must not reach the repository, not even inside a pickle.
FOREIGN = (
    *(bytes(path) for path in (HERE.parent, Path.home(), Path(sys.prefix), Path(sys.base_prefix))),
    b"/home/",
    b"/usr/",
    b"ckpt-fixtures-",
)


def _environment() -> dict[str, str]:
    """DeepSpeed on CPU, with a private folder for the extensions it compiles.

    A build that was killed leaves a lock behind on which every later run waits for ever.
    """
    version = importlib.metadata.version("deepspeed")
    built = Path(tempfile.gettempdir()) / f"ckpt-torch-extensions-{version}"
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR", built))
    extensions.mkdir(parents=True, exist_ok=True)
    for lock in extensions.rglob("lock"):
        lock.unlink()
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _launch(names: list[str], world: int, out: Path, limit: int) -> str:
    """Run the worker for some fixtures of one world size; returns what went wrong, if anything."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc_per_node", str(world), "--master_port", str(port)]
    command += [str(HERE / "fixture_worker.py"), str(out), *names]
    log = out / f"{names[0]}.log"
    with log.open("w") as sink:
        try:
            done = subprocess.run(
                command, env=_environment(), stdout=sink, stderr=sink, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no end after {limit} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in log.read_text().splitlines() if line.startswith("[rank")]
    return "\n".join(lines[-8:]) or log.read_text()[-2000:]


def _alone(spec: Spec) -> bool:
    """Whether a fixture needs processes of its own (Trainer and NVMe keep global state)."""
    return spec.trainer or "nvme" in json.dumps(spec.zero)


def _foreign(path: Path) -> list[str]:
    """The machine paths a file names."""
    content = path.read_bytes()
    return [bad.decode() for bad in FOREIGN if bad in content]


def _nobody(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """An archive member without the owner and date of this machine."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def _adopt(made: Path, target: Path, packed: bool) -> None:
    """Move a finished save_dir into fixtures/, without DeepSpeed's copies of its scripts."""
    for script in made.rglob("zero_to_*.py"):
        script.unlink()
    for path in filter(Path.is_file, made.rglob("*")):
        found = _foreign(path)
        if found:
            print(f"{made.name}/{path.relative_to(made)} dropped: it names {found}")
            path.unlink()
        elif path.stat().st_size > MAX_FILE and not packed:
            raise SystemExit(f"{path} is too big: {path.stat().st_size}")
    if packed:
        with tarfile.open(f"{target}.tar.xz", "w:xz", preset=9) as archive:
            archive.add(made, made.name, filter=_nobody)
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(made, target)


def make(names: list[str]) -> list[str]:
    """Make the named fixtures; returns the names that failed."""
    order = sorted(names, key=lambda n: (_alone(SPECS[n]), SPECS[n].world, list(SPECS).index(n)))
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ckpt-fixtures-") as folder:
        out = Path(folder)
        groups = itertools.groupby(order, lambda n: (SPECS[n].world, n if _alone(SPECS[n]) else ""))
        for (world, _), group in groups:
            batch, start = list(group), time.monotonic()
            # DeepSpeed copies whatever lies there, so also an earlier run's files.
            shutil.rmtree(NVME_PATH, ignore_errors=True)
            trouble = _launch(batch, world, out, 1200)
            print(f"world {world}: {len(batch)} in {time.monotonic() - start:.0f} s", flush=True)
            if trouble:
                print(trouble, flush=True)
            for name in batch:
                if (out / name / "live.safetensors").exists():
                    _adopt(out / name, FIXTURES / name, "nvme" in name)
                else:
                    failed.append(name)
    shutil.rmtree(NVME_PATH, ignore_errors=True)
    return failed


def check(roots: list[Path]) -> int:
    """Compare the live masters with DeepSpeed's reader; returns how many really differ."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    wrong = 0
    for root in roots:
        name = f"{root.relative_to(FIXTURES)!s:28}"
        live = load_file(root / "live.safetensors")
        masters = {k.removeprefix("fp32/"): v for k, v in live.items() if k.startswith("fp32/")}
        source = next(path.parent for path in root.rglob("latest"))
        try:
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                read = get_fp32_state_dict_from_zero_checkpoint(str(source))
        except Exception as error:  # it raises whatever it trips over
            print(f"{name} DeepSpeed cannot read it: {type(error).__name__}: {error}"[:120])
            continue
        differ = [k for k, v in masters.items() if k in read and not read[k].equal(v)]
        lost = sorted(k[5:] for k in live if k.startswith("live/") and k[5:] not in read)
        known = KNOWN.get(name.strip(), "")
        wrong += bool(differ) and not known
        verdict = f"{len(masters)} masters; differ: {differ}; DeepSpeed lacks: {lost} {known}"
        print(name, verdict.rstrip())
    return wrong


def _as_live(truth: Path) -> dict[str, torch.Tensor]:
    """A truth file of the corpus, keyed as our live.safetensors are."""
    prefixes = {"fp32": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "lp": "live"}
    live: dict[str, torch.Tensor] = {}
    entries: dict[str, Any] = torch.load(truth, weights_only=False)
    for name, value in entries.items():
        kinds = {"lp": value} if torch.is_tensor(value) else value
        for kind, tensor in kinds.items():
            if tensor is not None and kind in prefixes:
                buffer = name.startswith("BUF:")
                key = f"buffer/{name[4:]}" if buffer else f"{prefixes[kind]}/{name}"
                live[key] = tensor.detach().contiguous().clone()
    return live


def copy_corpus(corpus: Path) -> None:
    """Copy the checkpoints other DeepSpeed versions wrote, with the truth as live.safetensors."""
    skipped = shutil.ignore_patterns(
        "*_universal", "bundled_out.bin", "truth*.bin", "*.py", "__pycache__"
    )
    for source in sorted(filter(Path.is_dir, corpus.iterdir())):
        if source.name == "s3nvme":  # 15 MB; tests read it in place when it is there
            continue
        target = FIXTURES / "corpus" / source.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=skipped)
        for truth in source.rglob("truth*.bin"):
            name = truth.name.replace("truth", "live").replace(".bin", ".safetensors")
            save_file(_as_live(truth), target / truth.parent.relative_to(source) / name)
        for path in filter(Path.is_file, target.rglob("*")):
            found = _foreign(path)
            if found and path.name == "gen.json":
                path.unlink()
            elif found:
                print(f"corpus: {path.relative_to(target.parent)} names {found}")
    # A little of one universal folder, so that a reader can be shown to recognise it.
    sample = corpus / "s1bf" / "global_step2_universal"
    for path in [
        *sample.glob("mp_rank_*"),
        *sample.glob("zero/norm.*/*"),
        sample.parent / "latest_universal",
    ]:
        kept = FIXTURES / "corpus" / path.relative_to(corpus)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)


def write_table() -> None:
    """Bring the table in fixtures/README.md in line with what is made."""
    rows = ["| fixture | stage | dtype | ranks | how |", "|---|---|---|---|---|"]
    words = {"one": "one group", "empty": "an empty group", "decay": ""}
    for name, spec in SPECS.items():
        how = [words[spec.groups], "" if spec.tied else "untied", spec.note]
        how += ["zero-element parameters"] * spec.zero_sized
        how += ["`exclude_frozen_parameters=True`"] * spec.exclude_frozen
        how += [f"`{json.dumps(part)}`" for part in (spec.zero, spec.config) if part]
        cells = [f"`{name}`", str(spec.stage), spec.dtype, str(spec.world)]
        rows.append(f"| {' | '.join(cells)} | {'; '.join(filter(None, how))} |")
    made = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    text = (FIXTURES / "README.md").read_text()
    before, rest = text.split(TABLE[0])
    table = "\n".join([f"Made with Python {sys.version.split()[0]}, {made}.", "", *rows])
    (FIXTURES / "README.md").write_text(
        f"{before}{TABLE[0]}\n{table}\n{TABLE[1]}{rest.split(TABLE[1])[1]}"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME", help="fixtures to make (all)")
    parser.add_argument("--check", action="store_true", help="only compare with DeepSpeed's reader")
    parser.add_argument("--corpus", type=Path, help="only copy the corpus of real checkpoints")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(SPECS))
    if unknown:
        parser.error(f"no such fixture: {', '.join(unknown)}")
    names = args.names or list(SPECS)
    if args.corpus:
        copy_corpus(args.corpus.resolve())
        return 0
    if args.check:
        roots = [FIXTURES / name for name in args.names]
        roots = roots or [path.parent for path in sorted(FIXTURES.rglob("live.safetensors"))]
        return int(check(roots) > 0)
    failed = make(names)
    if not args.names:
        write_table()
    print(f"failed: {', '.join(failed)}" if failed else "all made")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
