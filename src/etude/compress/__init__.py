"""Make a network smaller."""
