"""Keeps node outputs for as long as RAM allows, and accounts for memory. Imports ops alone."""
