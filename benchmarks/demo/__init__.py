"""A demonstration of the engine on a Flux.1-shaped model made on the spot: no download, GPU or ComfyUI needed."""
