"""``lmm()`` and the methods of a fit."""
