"""Quantizes weights after training, without data: every float layer becomes a packed one."""
