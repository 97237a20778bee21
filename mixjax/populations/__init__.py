"""Simulated populations: variables described once, drawn by key."""
