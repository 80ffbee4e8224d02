"""Checkpoint formats of other libraries: what each writes into config.json, and the tensors of one layer."""
