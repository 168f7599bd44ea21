"""Pre-training stages: each turns unlabelled slices and a network into a better network."""

from clseg.stages.contrast import contrast
from clseg.stages.local import local

STAGES = {"contrast": contrast, "local": local}

__all__ = ["STAGES", "contrast", "local"]
