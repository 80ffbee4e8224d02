"""Adds int8 codes, activates and puts them on another grid, in one pass."""
