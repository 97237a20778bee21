"""From a Design to sums over its rows: bases, cross-products, chunks, devices."""
