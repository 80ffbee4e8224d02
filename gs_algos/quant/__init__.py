"""Holds the quantized layers of every kind: fake-quantized, packed and integer, and the schemes that describe them."""
