"""What the benchmarks share: processes that take turns, memory, reports, and ComfyUI."""
