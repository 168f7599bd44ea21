"""Fine-tuning recipes: each turns labelled slices and a network into a segmenter."""

from clseg.recipes.supervised import supervised

RECIPES = {"supervised": supervised}

__all__ = ["RECIPES", "supervised"]
