"""Compare networks with each other."""
