"""Distills: trains a network, compressed or not, to answer as its teacher does."""
