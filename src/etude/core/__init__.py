"""What methods share: sites, matching, codes, parameters, training, input checks."""
