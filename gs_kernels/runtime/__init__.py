"""Holds what every op is made of, and all that the ops know of PyTorch's insides."""
