"""Whole networks, compressed against float: latency, throughput, memory, training steps. `python -m bench.models`."""
