"""Who remembers: node outputs under RAM pressure, and memory accounting. Imports ops alone."""
