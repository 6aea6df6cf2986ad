"""Models of ComfyUI as files."""
