"""Rounds columns one after the other, each against the errors of those before: the inner loop of GPTQ."""
