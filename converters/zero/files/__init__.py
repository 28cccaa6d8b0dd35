"""The files of a checkpoint.

discovery       from the path that a user gives to the files of one tag
several_models  several models in one folder, each under a tag
state_files     the keys of a state file, checked once
keys            those that DeepSpeed gives a model file
typed           values of a state file, looked at before they are used
all_ranks       the files of all ranks, of one save
"""
