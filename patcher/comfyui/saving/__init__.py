"""Writes ComfyUI's models into files."""
