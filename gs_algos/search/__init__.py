"""Chooses settings layer by layer under a budget; the answer is a list of rules."""
