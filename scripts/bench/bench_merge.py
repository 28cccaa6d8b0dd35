"""Measures a merge beside a plain conversion of the same bytes: time, and memory at its peak.

    python scripts/bench/bench_merge.py --runs 4

A Llama in bf16 with a LoRA of rank 16 on every linear layer, saved by ZeRO-2, and its base model in
a folder. The commands take turns, with everything in the page cache. The checkpoint is made by a
process of its own, since a process's peak begins at its parent's size.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click
from bench import ENVIRONMENT, MIB, PYTHON, REPOSITORY, Cost, ckpt, run

LARGEST = 32768 * 2048 * 4  # bytes of the largest tensor: the embeddings, in fp32
LIMIT = (64 << 20) + LARGEST  # bytes that a merge may take
SLOWER = 1.5  # times the plain conversion that a merge may take

MAKE = """
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(REPOSITORY / "tests/support"))
import zero_folders

root, layers = Path(sys.argv[1]), int(sys.argv[2])
sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
config = LlamaConfig(vocab_size=32768, num_hidden_layers=layers, num_key_value_heads=4, **sizes)
torch.manual_seed(0)
base = LlamaForCausalLM(config).bfloat16()
base.save_pretrained(root / "base", max_shard_size="20GB")
lora = LoraConfig(r=16, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, lora, autocast_adapter_dtype=False)
with torch.no_grad():
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.normal_(std=0.02)
checkpoint = zero_folders.save(model, root / "checkpoint")
lora.base_model_name_or_path = str(root / "base")
lora.save_pretrained(checkpoint)
config.save_pretrained(checkpoint)
"""


def commands(root: Path, dtype: str) -> dict[str, list[str]]:
    """What is compared, by name; the first is the plain conversion."""
    start = ckpt(
        "to-fp32", root / "checkpoint", "-o", root / "out", "--overwrite", "--dtype", dtype
    )
    merge = [*start, "--merge"]
    return {
        "plain (--names as-stored)": [*start, "--names", "as-stored"],
        "--merge": merge,
        "--merge --base": [*merge, "--base", str(root / "base")],
    }


def measured(named: dict[str, list[str]], runs: int) -> dict[str, Cost]:
    """Of each command the fastest run, with the highest peak of any."""
    costs: dict[str, list[Cost]] = {name: [] for name in named}
    for _ in range(runs):
        for name, command in named.items():
            subprocess.run(["sync"], check=True)
            costs[name].append(run(command))
    return {
        name: min(each)._replace(peak=max(cost.peak for cost in each))
        for name, each in costs.items()
    }


@click.command()
@click.option("--runs", default=4, show_default=True, help="Runs of each command.")
@click.option("--layers", default=12, show_default=True, help="Layers of the model; 12: 1.4 GB.")
def main(runs: int, layers: int) -> None:
    """Print a line for each command, and fail where a bar does not hold."""
    bars_hold = True
    with tempfile.TemporaryDirectory() as folder:
        made = [PYTHON, "-c", MAKE, folder, str(layers)]
        subprocess.run(made, cwd=REPOSITORY, env=ENVIRONMENT, check=True)
        for dtype in ("fp32", "bf16"):
            costs = measured(commands(Path(folder), dtype), runs)
            plain = next(iter(costs.values()))
            for name, cost in costs.items():
                ratio = cost.wall / plain.wall
                bars_hold &= ratio <= SLOWER and cost.peak <= LIMIT
                click.echo(
                    f"{dtype} {name}: {cost.wall:.2f} s ({ratio:.2f}), {cost.peak / MIB:.0f} MiB"
                )
    sys.exit(not bars_hold)


if __name__ == "__main__":
    main()
