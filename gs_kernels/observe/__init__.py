"""Finds ranges of tensors, alone or in the same pass as fake-quant."""
