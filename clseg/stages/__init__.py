"""Pre-training stages: each turns unlabelled slices and a network into a better network."""

from clseg.stages.autoencoder import autoencoder
from clseg.stages.contrast import contrast
from clseg.stages.local import local
from clseg.stages.pretext import context_restoration, inpainting, pirl, rotation

_ALL = autoencoder, contrast, local, rotation, inpainting, context_restoration, pirl
SHARED = {"contrast", "local"}  # of which several processes can compute a batch together
STAGES = {stage.__name__: stage for stage in _ALL}
__all__ = ["SHARED", "STAGES", *STAGES]
