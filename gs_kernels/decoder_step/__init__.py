"""Computes all layers of a Llama for one token, with packed weights, on a CPU."""
