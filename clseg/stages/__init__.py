"""Pre-training stages: each turns unlabelled slices and a network into a better network."""

from clseg.stages.autoencoder import autoencoder
from clseg.stages.contrast import contrast
from clseg.stages.local import local

STAGES = {"autoencoder": autoencoder, "contrast": contrast, "local": local}

__all__ = ["STAGES", "autoencoder", "contrast", "local"]
