"""CPU seconds and memory of planning, over numbers of ranks: what grows, and how.

    python scripts/bench/plan.py                        read and show, reshard 64 -> 64
    python scripts/bench/plan.py --ranks 1024 --to 1024

The checkpoints are those of a Llama with one value an element of its shapes left out: stage 3,
the tensors' bytes holes, all ranks hard links of rank 0's files, which are alike but for their
names. Each measurement is a process of its own: CPU seconds of user and system, and the peak of
its memory, without those of an empty process.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click

SCRIPTS = Path(__file__).resolve().parents[1]
MEASURED = {
    "show": "from ckpt.cli.main import main; main(['show', source, '--json'])",
    "plan": (
        "from ckpt.rewrite import reshard\n"
        "print(reshard.plan(source, int(target), output=output).plan.nbytes)"
    ),
    "dry run": (
        "from ckpt.cli.main import main\n"
        "main(['reshard', source, '-o', output, '--world-size', target, '--dry-run'])"
    ),
}


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
        "print(u.ru_utime + u.ru_stime, u.ru_maxrss / 1024, file=sys.stderr)"
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
