"""How what ranks wrote becomes a checkpoint, or nothing.

commit     written aside by all ranks, then renamed
identity   which run the training is;  collision  a name that another run's checkpoint has
pointers   ``latest`` and ``best``, and retention
nodes      which ranks share a folder;  filesystem_trials  what the filesystem can do
"""
