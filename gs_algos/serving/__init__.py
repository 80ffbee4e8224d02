"""Serves packed models: by HTTP with LitServe, and inside vLLM."""
