"""GGUF files: their header, and weights that stay in the file's blocks until an operation needs their numbers."""
