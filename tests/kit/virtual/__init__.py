"""A device on a virtual clock: the engine runs as ever, and copies, waits and computations only move times.

clock      the times: threads of the host, streams, the bus, the disk
backend    the engine's Backend on that clock
readers    a pool of threads that read ahead, on that clock
hazards    finds what computes too early or is overwritten too early
math       the cost of casting, quantising and patching, in place of doing it
devices    figures of cards and of the machines around them
layers     layers whose forward takes what it would take on the device
models     architectures by their real shapes
"""
