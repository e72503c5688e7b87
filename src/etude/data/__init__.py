"""Named data sets and generators."""
