"""Computes y = act(conv(x, dequant(W)) + bias + residual) with a packed weight (gs_kernels/pack)."""
