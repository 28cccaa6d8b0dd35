"""A commit record with a bit flipped: refused, or read as what it was."""

from __future__ import annotations

from pathlib import Path

from ckpt.runs import manifest
from ckpt.runs.manifest import FileRecord, Manifest
from converters.errors import CheckpointError

WHOLE = Manifest(
    step=500,
    tag="global_step500",
    tier="full",
    save="0123456789abcdef",
    created=1763.25,
    stage=2,
    world_size=2,
    versions={"ckpt": "1.0", "torch": "2.13.0"},
    metrics={"eval_loss": 1.9375, "worst": float("inf")},
    progress={"lr": [0.001], "loss_scale": None, "samples": 4000},
    files={
        "model.safetensors": FileRecord(3, "crc32:00000000"),
        "a/b.pt": FileRecord(1, "zip:" + "0" * 64),
    },
)


def each_bit() -> tuple[int, int, list[str]]:
    """How many are refused, how many are the same manifest, and what is wrong."""
    data, refused, same = WHOLE.dumps(), 0, 0
    wrong: list[str] = []
    for at in range(len(data)):
        for bit in range(8):
            flipped = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            try:
                found = manifest.loads(flipped, Path("run/checkpoint-500/manifest.json"))
            except CheckpointError:
                refused += 1
                continue
            if found.dumps() == data:
                same += 1
            else:
                wrong.append(f"manifest.json: byte {at} ^ {1 << bit:02x}: taken in silence")
    return refused, same, wrong
