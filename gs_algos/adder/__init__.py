"""Swaps convolutions for sums of absolute differences (AdderNet)."""
