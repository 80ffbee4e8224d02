"""Searches for low-bit weights: mixes levels with a softmax, chooses one, and learns the logits that choose."""
