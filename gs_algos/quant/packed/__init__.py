"""Holds inference layers whose weight is packed 1-, 2-, 4- or 8-bit codes and whose activations are floats."""
