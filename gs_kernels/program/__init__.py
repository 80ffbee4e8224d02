"""Runs recorded calls of C++ kernels as one call."""
