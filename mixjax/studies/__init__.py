"""Simulation studies: populations, scenarios, replicates, measures, power."""
