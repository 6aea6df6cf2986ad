"""Reads files of pickled tensors without running them, and converts them to safetensors."""
