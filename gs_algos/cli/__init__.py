"""Holds the commands of `golden-stick`."""
