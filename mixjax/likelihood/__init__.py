"""From a Design to the Gaussian likelihood: cross-products, elimination, criterion, marginal likelihood."""
