"""One rank of a Trainer run that gets its fp32 weights back, as DeepSpeed's guides have it.

``recovery_worker.py OUT NAME last|best``; the models lie in OUT/0 and OUT/1. With "best" the
Trainer has loaded its best checkpoint at the end (load_best_model_at_end), the first one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Train, recover from a checkpoint, then from checkpoint-final; generate and save."""
    out, name, which = Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3]
    import deepspeed
    from fixture_specs import SPECS
    from fixture_worker import live_state, llama_trainer
    from safetensors.torch import save_file
    from transformers.trainer_utils import get_last_checkpoint

    from ckpt.zero_to_fp32 import load_state_dict_from_zero_checkpoint

    deepspeed.init_distributed(dist_backend="gloo")
    trainer = llama_trainer(name, out)
    if which == "best":
        load_best(trainer)
    trainer.train()
    live = live_state(trainer.model_wrapped, SPECS[name])
    if torch.distributed.get_rank() == 0:
        save_file(live, out / "live.safetensors")
    final = os.path.join(trainer.args.output_dir, "checkpoint-final")
    trainer.deepspeed.save_checkpoint(final)
    torch.distributed.barrier()

    last = get_last_checkpoint(trainer.args.output_dir)
    best = trainer.state.best_model_checkpoint
    saved = best if which == "best" else last
    assert saved is not None and (best is None or not best.endswith("-2"))
    for number, checkpoint in enumerate((saved, final)):
        model = load_state_dict_from_zero_checkpoint(trainer.model, checkpoint)
        assert not any(hasattr(p, "ds_id") for p in model.parameters())
        said = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False)
        assert said.shape == (1, 6)
        model.save_pretrained(out / str(number))  # transformers lets rank 0 write
    torch.distributed.barrier()
    os._exit(0)  # the engine's own teardown needs what recovery has undone


def load_best(trainer: Any) -> None:
    """Has the Trainer save twice, and load the first checkpoint at the end as its best."""
    from transformers.trainer_utils import IntervalStrategy

    arguments = trainer.args
    arguments.eval_strategy = arguments.save_strategy = IntervalStrategy.STEPS
    arguments.eval_steps = arguments.save_steps = 1
    arguments.metric_for_best_model, arguments.greater_is_better = "loss", False
    arguments.load_best_model_at_end = True
    trainer.evaluate = lambda *_, **__: {"eval_loss": float(trainer.state.global_step)}


if __name__ == "__main__":
    main()
