"""Weights read when they are asked for.

opened          ``ckpt.open``;  tensors  one tensor as an array
wished_names    names and layout as they are asked for;  model_names  those of the reader
published       the layout that save_pretrained writes
unusual         tensors that no safetensors file has;  torch_values  what torch makes of them
opened_adapter  the halves of a PEFT checkpoint
load_into       weights into a model, in place
"""
