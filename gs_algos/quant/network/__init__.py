"""Quantizes whole networks: plans them, prepares them, calibrates them and converts them to integers."""
