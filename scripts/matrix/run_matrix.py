"""Old and new versions of other libraries, tried with the wheel: the table of docs/versions.md.

    python scripts/matrix/run_matrix.py                       every row
    python scripts/matrix/run_matrix.py newest "DeepSpeed 0.16" --write

For each row of ``ROWS``: a new environment, the wheel with the extra ``all``, the versions that the
row pins, and then what the table has columns for, each in processes of its own. A cell is "yes", or
where it failed the last line of what was said. ``--write`` puts the table into docs/versions.md.
The exit code is 1 if a cell failed. A row takes three to five minutes on two cores and 2 GB of
disk, which is freed unless ``--keep`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/versions.md"
BEGIN, END = "<!-- matrix begins -->", "<!-- matrix ends -->"
SHOWN = (
    *("torch", "deepspeed", "transformers", "accelerate", "lightning", "peft"),
    *("huggingface_hub", "hf_xet"),
)
TRAININGS = ("class", "callback", "PEFT", "Accelerate", "Lightning", "Saver")
COLUMNS = ("convert", "push, pull", *TRAININGS)
CLIENT = ("push, pull",)
WITHOUT_TRAINER = tuple(name for name in COLUMNS if name not in ("class", "callback", "PEFT"))
MAX_SECONDS = 900  # of one cell; the first training of a row compiles an extension of DeepSpeed
# What the newest row pins, and every other one where it says nothing else. torch is the same in
# all but the last: older versions are on PyPI with CUDA only, which takes 5 GB of disk.
NEWEST = {
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "lightning": "2.6.6",
    "peft": "0.21.2",
    "huggingface_hub": "2.4.0",
}
OLDEST = {  # the lower bounds of the extras
    "deepspeed": "0.16.0",
    "transformers": "4.51.0",
    "accelerate": "1.0.0",
    "lightning": "2.5.0",
    "peft": "0.14.0",
    "huggingface_hub": "0.30.0",
}
SERVER = (  # the local Hub
    *("starlette==1.10.0", "uvicorn==0.54.0", "httptools==0.9.0"),
    *("lz4>=4.4", "pathspec>=1.0"),
)
BUILD = ("ninja", "setuptools<82")  # of DeepSpeed and its extension


@dataclass(frozen=True)
class Row:
    """Versions that are tried together; ``columns`` are those that make sense with them.

    ``without`` are packages that are taken out again when all is installed.
    """

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = COLUMNS
    stage: int = 2  # ZeRO's, of all trainings but Saver's, which has 3
    without: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether torch and the trainers are wanted; a row of the client alone needs neither."""
        return self.columns != CLIENT

    @property
    def pins(self) -> list[str]:
        """What pip is asked to install."""
        merged = {**NEWEST, **self.versions} if self.trains else self.versions
        return [f"{name}=={version}" for name, version in merged.items()]


ROWS = (
    Row("newest"),
    Row("torch 2.14", {"torch": "2.14.1"}),
    Row("transformers 4.57", {"transformers": "4.57.6", "huggingface_hub": "0.36.0"}),
    # By itself it fails in the first step of stages 1 and 2 with torch 2.13: "Output 0 of Split
    # is a view and is being modified inplace", in its all_gather_into_tensor_dp_groups.
    Row("DeepSpeed 0.18", {"deepspeed": "0.18.9"}, stage=3),
    Row("DeepSpeed 0.16", {"deepspeed": "0.16.9"}),
    Row("oldest", OLDEST),
    # The Trainer itself does not resume before torch 2.6: ckpt.requirements has the places.
    Row("torch 2.4", {"torch": "2.4.0", **OLDEST}, WITHOUT_TRAINER),
    # Its build for CUDA brings triton 3.2, which looks for a GPU when DeepSpeed is imported.
    Row("torch 2.6", {"torch": "2.6.0", **OLDEST}, without=("triton",)),
    *(
        Row(f"huggingface_hub {version}", {"huggingface_hub": version}, CLIENT)
        for version in ("0.30.2", "0.36.2", "1.0.1", "1.33.0", "2.0.0")
    ),
)


@dataclass
class Environment:
    """A virtual environment of one row, in a folder of its own."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        names = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
        return self.folder.joinpath("venv", *names)

    def install(self, wheel: Path, row: Row) -> None:
        """Makes it; ``subprocess.CalledProcessError`` if pip does not find the versions."""
        subprocess.run([sys.executable, "-m", "venv", self.folder / "venv"], check=True)
        if row.trains:
            by_name = {pin.partition("==")[0]: pin for pin in row.pins}
            # DeepSpeed is built from its source, which looks at the torch that is there
            self.pip("install", by_name["torch"], "wheel", "numpy", *BUILD)
            self.pip("install", "--no-build-isolation", by_name["deepspeed"])
        extra = "all" if row.trains else "hub"
        self.pip("install", f"{wheel}[{extra}]", *row.pins, *SERVER)
        if row.without:
            self.pip("uninstall", "--yes", *row.without)

    def pip(self, *arguments: str) -> str:
        """Runs pip there; its output."""
        quiet = ["--quiet"] if arguments[0] == "install" else []
        command = [self.python, "-m", "pip", *quiet, "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, env=alone(), check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    def versions(self) -> dict[str, str]:
        """What was installed in the end."""
        listed = json.loads(self.pip("list", "--format=json"))
        found = {each["name"].lower().replace("-", "_"): each for each in listed}
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        shown = {name: found[name]["version"] for name in SHOWN if name in found}
        return {"Python": python, **shown}

    def run(self, *command: object, support: bool = False) -> str:
        """Runs a program there; "" if it ends well, or the last line of what it said."""
        environment = alone() | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "0" if support else "1",
            "CXX": str(ROOT / "tests/support/compiler/g++"),
            "TORCH_EXTENSIONS_DIR": str(self.folder / "extensions"),
            "PATH": os.pathsep.join((str(self.python.parent), os.environ["PATH"])),
        }
        if support:
            environment["PYTHONPATH"] = str(ROOT / "tests/support")
        log_path = self.folder / "log"
        with log_path.open("a", encoding="utf-8") as log:
            print("\n$", *command, file=log, flush=True)
            start = log.tell()
            try:
                done = subprocess.run(
                    [self.python, *map(str, command)],
                    cwd=self.folder,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=MAX_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return f"took over {MAX_SECONDS} seconds"

        text = log_path.read_bytes()[start:].decode("utf-8", "replace")
        return "" if not done.returncode else _reason(text)

    def ranks(self, kind: str, out: Path, steps: int, stage: int) -> str:
        """A training on two ranks."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
        launch = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
        return self.run(*launch, ROOT / "scripts/matrix/trial.py", kind, out, steps, stage)

    def cell(self, column: str, stage: int = 2) -> str:
        """What became of a column: "" if all went well."""
        fixture = ROOT / "fixtures/trainer-zero3/checkpoint-2"
        if column == "convert":
            model = self.folder / "model"
            convert = ("to-fp32", fixture, "-o", model, "--check", "transformers")
            load = (
                "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
            )
            return self.run("-m", "ckpt", *convert) or self.run("-c", load, model)
        if column == "push, pull":
            trial = ROOT / "scripts/matrix/hub_trial.py"
            return self.run(trial, fixture, self.folder / "hub", support=True)

        out = self.folder / f"run-{column}"
        return (
            self.ranks(column, out, 2, stage)
            or self.ranks(column, out, 4, stage)
            or self.run("-m", "ckpt", "verify", out, "--data")
            or (self.adapters(out) if column == "PEFT" else "")
        )

    def adapters(self, out: Path) -> str:
        """The adapter that a run has trained, as PEFT loads it, and merged into its base."""
        base, adapter, merged = (self.folder / name for name in ("base", "adapter", "merged"))
        convert = ("-m", "ckpt", "to-fp32", out, "--last", "-o")
        return (
            self.run(*convert, adapter)
            or self.run(*convert, merged, "--merge", "--base", base)
            or self.run(ROOT / "scripts/matrix/adapter_trial.py", out, base, adapter, merged)
        )


def _reason(text: str) -> str:
    """The line that says most of what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    error = r"(\[rank\d\]: )?[\w.]*(Error|Exception)\b|.*: not whole$"
    errors = [line for line in lines if re.match(error, line)]
    line = next((line for line in errors if "ChildFailed" not in line), "")
    return (line or (lines[-1] if lines else "it said nothing"))[:200]


def alone() -> dict[str, str]:
    """The environment without what leads to this source tree: the wheel is tried."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def build(folder: Path) -> Path:
    """The wheel, of a copy: setuptools leaves folders in what it builds."""
    source = folder / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("ckpt", "converters"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder]
    subprocess.run([*command, source], check=True, env=alone())
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Outcome:
    """What became of a row: the versions that were there, and by column "" or what went wrong."""

    row: Row
    versions: dict[str, str]
    cells: dict[str, str]

    def mark(self, column: str) -> str:
        """The cell of the table."""
        if column not in self.cells:
            return "-"
        return "**no**" if self.cells[column] else "yes"


def tables(outcomes: Sequence[Outcome]) -> str:
    """The outcomes in Markdown, those of the Hub's client alone in a table of their own."""
    trained = [outcome for outcome in outcomes if outcome.row.trains]
    clients = [outcome for outcome in outcomes if not outcome.row.trains]
    lines: list[str] = []
    if trained:
        lines += _head("", [outcome.row.name for outcome in trained])
        stages = [str(outcome.row.stage) for outcome in trained]
        for library in ("Python", *SHOWN):
            lines.append(_line(library, [each.versions.get(library, "-") for each in trained]))
        lines.append(_line("ZeRO stage", stages))
        for column in COLUMNS:
            lines.append(_line(column, [outcome.mark(column) for outcome in trained]))
        lines.append("")
    if clients:
        heads = [outcome.versions["huggingface_hub"] for outcome in clients]
        lines += _head("huggingface_hub", heads)
        lines.append(_line("hf_xet", [each.versions.get("hf_xet", "none") for each in clients]))
        lines.append(_line(CLIENT[0], [outcome.mark(CLIENT[0]) for outcome in clients]))
        lines.append("")

    failures = [
        f"- {outcome.row.name}, {column}: `{reason}`"
        for outcome in outcomes
        for column, reason in outcome.cells.items()
        if reason
    ]
    return "\n".join([*lines, *failures]).strip()


def _head(name: str, heads: Sequence[str]) -> list[str]:
    return [_line(name, heads), "|" + "---|" * (len(heads) + 1)]


def _line(name: str, values: Sequence[str]) -> str:
    return f"| {' | '.join([name, *values])} |".replace("|  |", "| |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names of rows; default: all")
    parser.add_argument("--work", type=Path, help="a folder for the environments")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args()
    chosen = [row for row in ROWS if not options.rows or row.name in options.rows]
    if unknown := set(options.rows) - {row.name for row in ROWS}:
        parser.error(f"no row is called {' or '.join(sorted(unknown))}")

    work = options.work or Path(tempfile.mkdtemp(prefix="ckpt-matrix-"))
    work.mkdir(parents=True, exist_ok=True)
    wheel = build(Path(tempfile.mkdtemp(dir=work)))
    outcomes = []
    for row in chosen:
        environment = Environment(work / re.sub(r"\W+", "-", row.name))
        shutil.rmtree(environment.folder, ignore_errors=True)
        environment.folder.mkdir()
        environment.install(wheel, row)
        cells = {}
        for column in row.columns:
            cells[column] = environment.cell(column, row.stage)
            print(f"{row.name}: {column}: {cells[column] or 'yes'}", file=sys.stderr, flush=True)
        outcomes.append(Outcome(row, environment.versions(), cells))
        if not options.keep:
            shutil.rmtree(environment.folder / "venv")

    text = tables(outcomes)
    print(text)
    if options.write:
        page = PAGE.read_text("utf-8")
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")
    sys.exit(any(reason for outcome in outcomes for reason in outcome.cells.values()))


if __name__ == "__main__":
    main()
