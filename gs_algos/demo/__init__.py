"""Holds the data sets, networks and training loop that the command line, the benchmark and the tests share."""
