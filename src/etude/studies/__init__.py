"""One file a paper: its claims, arms and figure. Found through the entry-point group ``etude.studies``."""
