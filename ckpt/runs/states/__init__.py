"""In which state every checkpoint of a run is, whoever wrote it,
and which one a resume takes.

save_dirs     folders that tags were saved right into, which are no checkpoints
status        committed, complete, incomplete or unknown
evaluation    the metrics of a checkpoint, as the Trainer logged them
listing       the checkpoints at a path, of all writers, with their states
checksums     what has a checksum in a checkpoint, all of it or a sample, and what has none
verification  whether checkpoints are whole: by names and headers, or by every byte
target        what a path and a tag mean: a run, a checkpoint, or nothing yet
copies        which are copies by hand of others
dangling      whether the file latest of a run names what is not there
trainings     which are of several trainings, as their logs differ
offers        the checkpoints of a run that a training can go on from, the newest first
offer_order   in which order they come
misnumbered   those whose names say a later step than their files
skipped       those that it does not, and whether work is lost with them
choice        the one that ``ckpt.find`` and ``ckpt.resume`` take
newest        the one whose weights ``--last`` and ``ckpt push`` take

Nothing here imports torch.
"""
