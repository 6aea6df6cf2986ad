"""The RAM that this process can have, and the C library's share of it."""
