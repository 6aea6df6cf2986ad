"""Puts the output cache in the place of ComfyUI's own."""
