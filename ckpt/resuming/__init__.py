"""A training goes on from a checkpoint, as the same run.

resume         ``ckpt.resume``; several_engines the same for several at once
request        what was asked for, the same on all ranks
select         which checkpoint: agreement of all ranks on what runs/states offers
resume_point   what a checkpoint holds for each rank
topology, configured  whether it loads on these ranks
changes, config, comparison, continuity, value_text  what differs, and what comes of it
load           DeepSpeed's own load;  torch_resume  a plain torch training
plain          trainings without DeepSpeed, which load by themselves
"""
