"""Reads a model's graph of modules, finds patterns in it, and turns functional calls into layers."""
