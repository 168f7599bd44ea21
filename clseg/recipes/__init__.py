"""Fine-tuning recipes: each turns labelled slices and a network into a segmenter."""

from clseg.recipes.adversarial import adversarial
from clseg.recipes.gan_augmentation import gan_augmentation
from clseg.recipes.mean_teacher import mean_teacher
from clseg.recipes.self_training import self_training
from clseg.recipes.supervised import supervised
from clseg.recipes.weak_to_strong import weak_to_strong

_ALL = supervised, self_training, mean_teacher, weak_to_strong, adversarial, gan_augmentation
RECIPES = {recipe.__name__: recipe for recipe in _ALL}
__all__ = ["RECIPES", *RECIPES]
