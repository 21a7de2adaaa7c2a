"""Calibration and evaluation data: read, check against the model's inputs, or generate."""
