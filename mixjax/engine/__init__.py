"""The Gaussian likelihood as a function of sums over rows, its derivatives, and the mixed-model equations."""
