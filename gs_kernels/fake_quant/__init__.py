"""Rounds to a small integer grid and back, with straight-through and learned-step gradients."""
