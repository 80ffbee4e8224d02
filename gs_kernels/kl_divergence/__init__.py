"""Computes the divergence of a student's softmax from its teacher's, from logits."""
