"""Weights in and out of safetensors files."""
