"""The demo's second half: the same checkpoint in a real ComfyUI."""
