"""Bytes to bytes: formats read as tensors located in files, and written by moving bytes."""
