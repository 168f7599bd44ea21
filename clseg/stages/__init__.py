"""Pre-training stages: each turns unlabelled slices and a network into a better network."""

from clseg.stages.autoencoder import autoencoder
from clseg.stages.contrast import contrast
from clseg.stages.local import local
from clseg.stages.pretext import context_restoration, inpainting, pirl, rotation

STAGES = {
    stage.__name__: stage for stage in (autoencoder, contrast, local, rotation, inpainting, context_restoration, pirl)
}

__all__ = ["STAGES", *STAGES]
