"""Removes channels from networks, by importance (Prune) or by a comparison with knockoffs (SCOP)."""
