"""Checkpoints that were written without ckpt, or by another training.

completeness  whether one is whole, by what its writer writes
intact_files  whether its files are whole, by their own form
parallel      pipelines and other parallelism that is not read
succession    whether it goes on from a committed one
liveness      whether somebody writes it right now
evaluation    its metrics, as the Trainer logged them
overwriting   whether two saves are mixed in it
torn          whether a folder can be a checkpoint at all
"""
