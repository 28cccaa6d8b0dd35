"""CPU seconds and memory of planning, over numbers of ranks: what grows, and how.

    python scripts/bench/plan.py                        64, 256 and 1,024 ranks; 64 to 128 and 512
    python scripts/bench/plan.py --ranks 1024 --to 512

The checkpoints are of a Llama in stage 3; the tensors' bytes are holes, and the files of all
ranks hard links of rank 0's. What is planned is proven, too, against files that have their headers
only. Each measurement is a process of its own: CPU seconds of user and system, and the peak of its
memory.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import click

SCRIPTS = Path(__file__).resolve().parents[1]
PLAN = """
from pathlib import Path
from ckpt.rewrite import reshard
from converters.storage import open_files
rewriting = reshard.plan(source, int(target), output=output)
"""
PROVE = """
from converters.zero.native import reshard as native
folder = Path(output)
for shard in rewriting.plan.shards:
    path = folder / shard.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(shard.nbytes)
        for offset, literal in shard.literals:
            file.seek(offset)
            file.write(literal)
with open_files.once():
    native.prove(rewriting.source, rewriting.target, rewriting.plan, folder)
"""
SHOW = "from ckpt.cli.main import main; main(['show', source, '--json'])"


class Cost(NamedTuple):
    """What a process took: CPU seconds, and its peak of memory in MiB."""

    cpu: float
    peak: float

    def __str__(self) -> str:
        return f"{self.cpu:7.2f} s {self.peak:6.0f} MiB"


def make(folder: Path, ranks: int, tensors: int) -> Path:
    """A sparse checkpoint of stage 3 with so many ranks, and about so many tensors."""
    sys.path[:0] = [str(SCRIPTS / "fixtures")]
    import big_checkpoint
    import torch
    from llama_shapes import llama, llama_config

    config = llama_config(350_000_000, False)
    shapes = llama(config | {"num_hidden_layers": max((tensors - 3) // 9, 1)})
    place = folder / f"{ranks}x{tensors}"
    tag = place / big_checkpoint.TAG
    tag.mkdir(parents=True)
    optimizer = big_checkpoint.stage3_optimizer(shapes, 0, ranks, True)
    model = big_checkpoint.model_states(3, shapes, 0, ranks, False)
    for name, root in (
        ("bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": optimizer}),
        ("zero_pp_rank_{}_mp_rank_00_model_states.pt", model),
    ):
        first = tag / name.format(0)
        big_checkpoint.save(root, first, 3, True, nameless=True)
        for rank in range(1, ranks):
            os.link(first, tag / name.format(rank))

    (place / "latest").write_text(big_checkpoint.TAG)
    assert torch.is_tensor(optimizer["fp32_flat_groups"][0])
    return place


def measure(statement: str, source: Path, output: Path, target: int) -> Cost:
    """The cost of some Python in a process of its own."""
    preamble = f"source, output, target = {str(source)!r}, {str(output)!r}, {str(target)!r}\n"
    report = (
        "\nimport resource as r, sys\nu = r.getrusage(r.RUSAGE_SELF)\n"
        # ru_maxrss is that of the process which started this one, if that was larger
        "peak = next(w for w in open('/proc/self/status') if w.startswith('VmHWM')).split()[1]\n"
        "print(u.ru_utime + u.ru_stime, int(peak) / 1024, file=sys.stderr)"
    )
    guarded = f"try:\n    exec({statement!r})\nexcept SystemExit:\n    pass"
    code = preamble + guarded + report
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if result.returncode:
        raise click.ClickException(result.stderr)
    cpu, peak = map(float, result.stderr.split()[-2:])
    return Cost(cpu, peak)


@click.command()
@click.option("--ranks", multiple=True, type=int, default=(64, 256, 1024), show_default=True)
@click.option("--to", "targets", multiple=True, type=int, default=(128, 512), show_default=True)
@click.option("--tensors", default=741, show_default=True)
def main(ranks: tuple[int, ...], targets: tuple[int, ...], tensors: int) -> None:
    """Print the costs of show for each number of ranks, and of reshard from the first one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sources = {count: make(folder, count, tensors) for count in ranks}
        for count, source in sources.items():
            click.echo(f"show {count:5}            {measure(SHOW, source, folder / 'none', 0)}")

        first, source = next(iter(sources.items()))
        for target in targets:
            for name, statement in (("plan", PLAN), ("plan and proof", PLAN + PROVE)):
                with tempfile.TemporaryDirectory() as place:
                    cost = measure(statement, source, Path(place) / "output", target)
                click.echo(f"{name} {first} to {target}  {cost}")


if __name__ == "__main__":
    main()
