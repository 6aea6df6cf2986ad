"""Weights in INT8, their products, and whether they pay."""
