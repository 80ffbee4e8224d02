"""Multiplies rows with Hadamard matrices, alone or in the same pass as rounding them to int8."""
