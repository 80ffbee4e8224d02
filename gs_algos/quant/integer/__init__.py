"""Holds converted layers that multiply int8 codes, and the tensors that pass int8 from one layer to the next."""
