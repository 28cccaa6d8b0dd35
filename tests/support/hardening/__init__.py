"""Attacks on the toolkit, in bounded time as tests and for longer by scripts/harden.py."""
