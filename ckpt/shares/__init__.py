"""One output made by several processes, each a share of its bytes.

moving         the bytes of an output, moved by one process or by several
share_folder   the staging folder that all of them write into
launch         which of several processes a launcher says that this one is
company        processes at work at the same time, in steps
division       how a command is divided: among these, or by shares that are joined later
"""

# variables that a process has which a launcher started as one of several
SIGNS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX", "WORLD_SIZE")
