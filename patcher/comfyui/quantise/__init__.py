"""Weights in the formats that ComfyUI reads from quantised files, made as they are brought or saved."""
