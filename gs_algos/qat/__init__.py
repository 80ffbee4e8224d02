"""Trains quantized networks: SimQAT, which rounds in the forward, and SLB, which searches low-bit levels."""
