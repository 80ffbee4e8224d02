"""Searching for low-bit weights: mixing levels with a softmax, choosing them, and learning the logits that choose."""
