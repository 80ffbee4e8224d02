"""Tells what compression costs: how much each layer of a network minds it."""
