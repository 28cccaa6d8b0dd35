"""Saving inside a training: a saver whose checkpoints are whole or absent.

saver          the Saver of a plain loop;  saved_training  what it saves
torch_states   a training of plain torch as it is saved
front_end      what every front end does to save
tiers          what is saved, under which name, and when
capture        the state of a training, taken down in the middle of it
rank_work      what one rank writes;  pending  a save between the call and its commit
host_copies    the copies that a save in the background writes from
model_weights, streamed, adapter  weights that from_pretrained or PEFT load
engines        several engines that are saved as one
preflight      would the saves to come succeed?
preemption     being asked to stop;  at_exit  the end of the process
commit/        one checkpoint, whole or absent, on all nodes
"""
