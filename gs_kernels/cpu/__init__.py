"""Builds and loads the library of all C++ kernels; the source of each lies in the folder of its op."""
