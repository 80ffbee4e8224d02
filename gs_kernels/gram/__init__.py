"""Sums products of the columns of inputs over tokens: second moments, and what two inputs share."""
