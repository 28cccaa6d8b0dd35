"""Thin adapters: saves of the Hugging Face Trainer, Accelerate and Lightning, committed."""
