"""A checkpoint to a model folder.

to_fp32       ``ckpt.to_fp32``, in one call
convert       locate, plan, move, commit;  task  what was decided, as a value
weight_shares  shares of them that several processes write
record        conversion.json, as a value;  description  what it says of a conversion
planning      what is written, step by step
layout        the layout that is written, and copies in another one
sources       the fp32 weights or the 16-bit ones
weight_files  the files that weights are cut into
comparison    what was compared with copies
output_place  where the output may be
lightning     ``--format lightning``
fp32_slimming  a checkpoint made weights-only that keeps fp32 weights
"""
