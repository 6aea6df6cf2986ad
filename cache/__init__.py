"""Who remembers: node outputs under RAM pressure, and memory accounting. Imports ops alone; never ComfyUI.

Host layer, as everywhere, are the files named comfy_*.py.
"""
