"""Checkpoints on the Hugging Face Hub: push, pull, and pushes behind the training."""
