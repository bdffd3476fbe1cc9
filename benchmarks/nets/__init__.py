"""Trained nets that package registries ship, each with calibration inputs, held-out inputs and a metric."""
