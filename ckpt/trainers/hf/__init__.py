"""The Hugging Face Trainer.

mixin          ``CommittedCheckpoints``: a Trainer whose checkpoints are written aside and renamed
instances      ``commit``: the same of a Trainer that is there
callback       ``CheckpointCallback``: commits in place, for any Trainer
resuming       ``ResumeCallback``; loading, comparing, load_watch: how a Trainer goes on
plain          trainings without DeepSpeed: FSDP, DDP, one process;  plain_resume  how these go on
trainer_state  what its arguments and state say;  disk_space  what it will write
stopping       a last save when it is asked to stop
"""

from ckpt import requirements

requirements.require_torch("ckpt.trainers.hf")
requirements.require("ckpt.trainers.hf", "transformers", "accelerate")
requirements.require_if_installed("ckpt.trainers.hf", "deepspeed")
requirements.warn_of_old_torch()

from ckpt.trainers.hf.callback import CheckpointCallback
from ckpt.trainers.hf.instances import CommitOptions, commit
from ckpt.trainers.hf.mixin import CommittedCheckpoints
from ckpt.trainers.hf.resuming import ResumeCallback

__all__ = [
    "CheckpointCallback",
    "CommitOptions",
    "CommittedCheckpoints",
    "ResumeCallback",
    "commit",
]
