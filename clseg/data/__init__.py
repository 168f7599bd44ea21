"""Volumes in, slices out; knows nothing of training."""
