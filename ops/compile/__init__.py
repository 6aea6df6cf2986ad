"""Blocks compiled without owning a weight."""
