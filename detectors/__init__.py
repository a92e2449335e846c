"""Detectors: one module a stream protocol, and the simulated detector that speaks them."""
