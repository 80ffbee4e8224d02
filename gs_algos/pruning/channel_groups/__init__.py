"""Finds which channels of which tensors must be removed together."""
