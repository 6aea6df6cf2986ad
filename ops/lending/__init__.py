"""Bundles lent to layers for the length of one forward."""
