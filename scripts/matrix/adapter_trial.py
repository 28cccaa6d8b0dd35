"""Loads what ckpt made of a LoRA run, and compares: ``adapter_trial.py RUN BASE ADAPTER MERGED``.

The adapter is compared with the one that the Trainer saved in the newest checkpoint, and the merged
model with the one that PEFT merges.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ckpt

FILE = "adapter_model.safetensors"


def main() -> None:
    run, base, adapter, merged = map(Path, sys.argv[1:])
    ours, saved = load_file(adapter / FILE), load_file(str(ckpt.find(run)) + "/" + FILE)
    assert ours.keys() == saved.keys() and len(ours) == 16  # 8 of them biases
    assert all(torch.equal(ours[name].bfloat16(), saved[name].bfloat16()) for name in saved)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    loaded = model.state_dict()
    for name, tensor in ours.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor), name

    words = torch.arange(8)[None]
    expected = model.merge_and_unload()(words).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(merged)(words).logits, expected)


if __name__ == "__main__":
    main()
