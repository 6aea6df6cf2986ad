"""The engine: sources, bundles, VBARs, offload streams, pins, the caster. Never imports ComfyUI."""
