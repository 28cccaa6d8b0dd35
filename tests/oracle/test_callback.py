"""What a trainer shows to ckpt, where that is not what it was told to run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from heavy_libraries import LateModule

from converters.errors import CheckpointError

hf = LateModule("ckpt.trainers.hf")  # which imports transformers
accelerate = LateModule("ckpt.trainers.accelerate")
STATE = SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False)


def test_a_training_with_deepspeed_that_shows_none_is_not_passed_over_in_silence() -> None:
    """As transformers before 4.50 did: nothing was committed, and the training ended well."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    counts = {"process_index": 0, "world_size": 1}
    arguments = SimpleNamespace(deepspeed_plugin=object(), save_total_limit=None, **counts)
    with pytest.raises(CheckpointError, match=r"is AdamW, expected DeepSpeedOptimizerWrapper"):
        hf.CheckpointCallback().on_train_begin(arguments, STATE, None, optimizer=optimizer)


def begin_by_class(args: SimpleNamespace) -> None:
    trainer = hf.CommittedCheckpoints.__new__(hf.CommittedCheckpoints)
    trainer._prepare_commits()
    trainer.args, trainer.is_deepspeed_enabled, trainer.model_wrapped = args, True, None
    trainer._begin()


@pytest.mark.parametrize(
    ("begin", "remedy"),
    [
        (begin_by_class, "use_cpu=True"),
        (lambda args: hf.CheckpointCallback().on_train_begin(args, STATE, None), "use_cpu=True"),
        (lambda args: accelerate.save_state(args, "out"), r"PartialState\(cpu=True\)"),
        (lambda args: accelerate.load_state(args, "out"), r"PartialState\(cpu=True\)"),
    ],
    ids=["class", "callback", "save_state", "load_state"],
)
def test_a_trainer_that_counts_other_ranks_is_refused(
    begin: Callable[[SimpleNamespace], object], remedy: str
) -> None:
    """Two ranks that take themselves for the first of one tore the file of both."""
    counts = {"process_index": 0, "world_size": 2, "num_processes": 2}
    args = SimpleNamespace(save_total_limit=None, **counts)
    with pytest.raises(CheckpointError, match=f"process 0 of 2, and .* rank 0 of 1, .*{remedy}"):
        begin(args)
