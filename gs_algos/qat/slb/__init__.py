"""Implements SLB, searching for low-bit weights: each weight chooses among a few levels while it trains."""
