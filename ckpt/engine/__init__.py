"""The only place that knows DeepSpeed's engine and its private attributes.

view               an engine as the front ends see it: a Protocol, and questions about the rest
attributes         what of DeepSpeed this folder relies on, as a table; what an upgrade dropped
inventory          the tensors of a running training
placeholders       parameters of ZeRO-3 in a model, and the model without DeepSpeed
partitions         what this rank holds of them
splitting/         what each rank has of a tensor where more than ZeRO cuts it
layout             how the training cuts up its state
parameters, optimizers, settings, progress  what a manifest says of a training
precision          fp32, bf16 and fp16 engines and their files
state_size         how many bytes a save will write
first_step         what an optimizer will keep after its first step
checkpoint_engine  DeepSpeed's seam for writing files
mapped_loading     DeepSpeed's loading, with mapped files
remedies           what a front end offers where a training is not as it was saved
"""
