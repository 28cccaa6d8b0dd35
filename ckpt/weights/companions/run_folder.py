"""The tokenizer that lies in the folder of a run, and not in its checkpoints.

Some training scripts save a tokenizer once, beside the checkpoints, where
``trainer.save_model`` puts it, too:

    out/tokenizer.json  out/tokenizer_config.json  out/checkpoint-500/...
"""

from __future__ import annotations

from pathlib import Path

from ckpt.runs.recognition import step_in
from ckpt.weights.companions import model_folder
from converters.errors import unreadable
from converters.storage import stores
from converters.words import some

# one of these is in every folder that save_pretrained of a tokenizer or a processor
# wrote
SIGNS = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json")


def readers(checkpoint: Path) -> dict[str, Path]:
    """The files of a tokenizer or processor in the run's folder, by name.

    Empty where the folder is not named as a run's checkpoint is, such as checkpoint-500.
    """
    if step_in(checkpoint.name) is None:
        return {}

    folder = checkpoint.resolve().parent
    if not any(stores.is_file(folder / name) for name in SIGNS):
        return {}
    try:
        return dict(model_folder.companion_files(folder).readers)
    except OSError as error:
        raise unreadable(error, folder) from error


def note(names: dict[str, Path]) -> str:
    """The line that says so."""
    return f"the tokenizer is that of the folder above the checkpoint ({some(list(names))})"
