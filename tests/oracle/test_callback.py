"""What a Trainer shows to its callbacks, where that is not what it was told to run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from heavy_libraries import LateModule

from converters.errors import CheckpointError

hf = LateModule("ckpt.trainers.hf")  # which imports transformers


def test_a_training_with_deepspeed_that_shows_none_is_not_passed_over_in_silence() -> None:
    """As transformers before 4.50 did: nothing was committed, and the training ended well."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    state = SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False)
    told = SimpleNamespace(deepspeed_plugin=object(), save_total_limit=None)
    with pytest.raises(CheckpointError, match=r"is AdamW, expected DeepSpeedOptimizerWrapper"):
        hf.CheckpointCallback().on_train_begin(told, state, None, optimizer=optimizer)
