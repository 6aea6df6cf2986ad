"""Who moves and computes: sources, bundles, VBARs, offload streams, pins, the caster. Never imports ComfyUI."""
