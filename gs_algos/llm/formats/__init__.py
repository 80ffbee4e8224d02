"""Reads and writes other libraries' checkpoint formats: their part of config.json, and the tensors of one layer."""
