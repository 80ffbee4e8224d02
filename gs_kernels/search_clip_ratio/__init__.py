"""Searches the share of each row's range whose grid loses least."""
