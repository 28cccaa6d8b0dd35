"""One rank of a Trainer run that gets its fp32 weights back, as DeepSpeed's guides have it.

``recovery_worker.py OUT NAME``; the models lie in OUT/0 and OUT/1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def main() -> None:
    """Train, recover from the last checkpoint, then from one saved by hand; generate and save."""
    out, name = Path(sys.argv[1]).resolve(), sys.argv[2]
    import deepspeed
    from fixture_specs import SPECS
    from fixture_worker import live_state, llama_trainer
    from safetensors.torch import save_file
    from transformers.trainer_utils import get_last_checkpoint

    from ckpt.zero_to_fp32 import load_state_dict_from_zero_checkpoint

    deepspeed.init_distributed(dist_backend="gloo")
    trainer = llama_trainer(name, out)
    trainer.train()
    live = live_state(trainer.model_wrapped, SPECS[name])
    if torch.distributed.get_rank() == 0:
        save_file(live, out / "live.safetensors")
    trainer.deepspeed.save_checkpoint(str(out / "by-hand"))
    torch.distributed.barrier()

    last = get_last_checkpoint(trainer.args.output_dir)
    assert last is not None
    for number, checkpoint in enumerate((last, out / "by-hand")):
        model = load_state_dict_from_zero_checkpoint(trainer.model, checkpoint)
        assert not any(hasattr(p, "ds_id") for p in model.parameters())
        said = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False)
        assert said.shape == (1, 6)
        model.save_pretrained(out / str(number))  # transformers lets rank 0 write
    torch.distributed.barrier()
    os._exit(0)  # the engine's own teardown needs what recovery has undone


if __name__ == "__main__":
    main()
