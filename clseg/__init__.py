"""Contrastive pre-training for medical image segmentation with few labels: three papers on one footing."""

__version__ = "0.1.0"
