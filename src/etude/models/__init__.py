"""The few small reference networks that studies and tests use."""
