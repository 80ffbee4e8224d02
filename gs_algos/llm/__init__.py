"""Quantizes language models in folders of Transformers, loads them, and exchanges them with other libraries."""
