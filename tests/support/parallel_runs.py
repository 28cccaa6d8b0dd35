"""What has to hold of a run that ``ckpt.Saver`` saved of more parallelism than ZeRO."""

from __future__ import annotations

from pathlib import Path

from heavy_libraries import LateModule
from oracles import weights_in

import ckpt
from ckpt.runs.manifest import check
from ckpt.runs.run import Run

torch = LateModule("torch")


def require_run(run: Path, stock: Path) -> None:
    """Fails unless the run has one whole checkpoint, with the files and weights of ``stock``.

    ``stock`` is what ``engine.save_checkpoint`` wrote at the same step. The weights beside
    the states, and those of ``live.save_fp32`` in RUN-fp32, have the bytes that a
    conversion writes. Of AutoEP the live state dict in RUN.pt has them under AutoEP's names.
    """
    (checkpoint,) = Run(run).checkpoints()
    assert checkpoint.manifest is not None
    assert check(checkpoint.folder, checkpoint.manifest, data=True) == []
    (tag_folder,) = stock.glob("global_step*")
    listed = [name for name in checkpoint.manifest.files if name.startswith(tag_folder.name)]
    expected = [path.relative_to(stock).as_posix() for path in tag_folder.iterdir()]
    assert sorted(listed) == sorted(expected)

    names, live_state = "as-stored", Path(f"{run}.pt")
    if live_state.exists():
        output = Path(f"{run}-converted")
        ckpt.to_fp32(checkpoint.folder, output, names=names)
        expected_tensors, state = weights_in(output), torch.load(live_state)
        assert state.keys() == expected_tensors.keys()
        assert all(torch.equal(state[name], expected_tensors[name]) for name in state)
        names = "hf"  # which live.save_fp32 gives the model of transformers

    for dtype, folder, size in (
        ("bf16", checkpoint.folder, "5GB"),
        ("fp32", Path(f"{run}-fp32"), "4kB"),
    ):
        output = Path(f"{run}-{dtype}-converted")
        options = {"names": names, "layout": "runtime"}
        ckpt.to_fp32(checkpoint.folder, output, dtype=dtype, max_shard_size=size, **options)
        for path in output.glob("*.safetensors*"):
            assert (folder / path.name).read_bytes() == path.read_bytes(), path
