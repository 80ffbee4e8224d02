"""Computes y = act(x @ dequant(W)^T + bias) with a packed weight (gs_kernels/pack)."""
