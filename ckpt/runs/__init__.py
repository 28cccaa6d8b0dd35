"""Runs: what a save committed, what may be deleted,
and how to put right what a crash left.

run                the checkpoints of a folder, and the pointers latest and best
checkpoint_folder  a folder that is taken for a checkpoint, committed or not
recognition        what a folder or a file is taken for, by names alone
manifest           the commit record of a checkpoint
fields             what its fields may be
ancestry           what a checkpoint was made of, where ckpt made it of another one
conversions        the same of weights
digests            what binds the bytes of a file, and files checked against it
user_paths         what a path that a user gave is: a run, a checkpoint, or neither
verify             whether a checkpoint is whole
lineage            which training saved it, and the launches that led to it
engines            several engines in one checkpoint
lease/             one job at a time saves into a folder
retention          which checkpoints to keep: a value and a pure function
pruning, deletion  deletion that no crash turns into half a checkpoint
renaming           checkpoints under other names than those they were saved under
foreign/           checkpoints that were written without ckpt, or by another training
states/            committed, complete or incomplete, whoever wrote it; which one a resume takes
upkeep/            doctor, adoption, slim, collect

Nothing here imports torch: a run is managed from any machine that sees its folder.
"""
