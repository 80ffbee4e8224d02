"""Runs several algorithms one after another, from Python or from a TOML recipe."""
