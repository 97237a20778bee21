"""The record of one fit, what it answers for itself, and many fits with names."""
