"""The Hugging Face Trainer.

mixin          ``CommittedCheckpoints``: a Trainer whose checkpoints are written aside and renamed
callback       ``CheckpointCallback``: commits in place, for any Trainer
resuming       ``ResumeCallback``; loading, comparing, load_watch: how a Trainer goes on
trainer_state  what its arguments and state say;  disk_space  what it will write
stopping       a last save when it is asked to stop
"""

from ckpt import requirements

requirements.require("ckpt.trainers.hf", "transformers", "accelerate", "deepspeed")
requirements.warn_of_old_torch()

from ckpt.trainers.hf.callback import CheckpointCallback
from ckpt.trainers.hf.mixin import CommittedCheckpoints
from ckpt.trainers.hf.resuming import ResumeCallback

__all__ = ["CheckpointCallback", "CommittedCheckpoints", "ResumeCallback"]
