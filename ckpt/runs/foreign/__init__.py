"""Checkpoints that were written without ckpt, or by another training.

signs         what in a run's folder is taken for a checkpoint
completeness  whether one is whole, by what its writer writes
proofs        what one was proven to be
intact_files  whether its files are whole, by their own form
dcp_files     those of torch's distributed checkpoints, and of FSDP
parallel      pipeline, tensor and expert parallelism: all that their files have to be
succession    whether it goes on from a committed one, by histories: what the Trainer logged
liveness      whether somebody writes it right now
resume_files  which of its files a resume reads
step_records  whether its files are of one step, by what they count
copied_files  single files in it that are another checkpoint's
overwriting   whether two saves are mixed in it, by times and by value_samples
replaceable   whether an output may take its place
torn          whether a folder can be a checkpoint at all
"""
