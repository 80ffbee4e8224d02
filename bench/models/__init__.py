"""Measures whole networks, compressed against float, by `python -m bench.models`: times and memory."""
