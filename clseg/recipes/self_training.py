"""Self-training: the segmenter learns from its own labels of the slices that have none.

Source: Bai et al., MICCAI 2017, with one weight for both losses; compared by Chaitanya et al., NeurIPS 2020.
*Deviation*: predicted labels are not refined by a conditional random field.
"""

from copy import deepcopy

from torch import Tensor

from clseg.config import SelfTrainingRecipe
from clseg.loop import Training, Work
from clseg.losses import SEGMENTATION_LOSSES
from clseg.recipes.supervised import labelled_batch, require_unlabelled, unlabelled_batch


def self_training(work: Work, recipe: SelfTrainingRecipe) -> Training:
    """L(labelled) + weight L(unlabelled, labels of a frozen copy), as many slices of each.

    Up to `warm_up` of the steps there is the first term alone. From there on the copy is renewed at `rounds` equally
    spaced steps. It labels the slices as they are, by their most probable class; slices and labels are then augmented
    alike. Raises `RequestError` without unlabelled slices.
    """
    require_unlabelled(work, recipe)
    segmentation_loss = SEGMENTATION_LOSSES[recipe.loss]
    network, steps = work.network, work.steps
    copy = deepcopy(network).requires_grad_(False)
    first = round(recipe.warm_up * steps)
    renewals = {first + (steps - first) * k // recipe.rounds for k in range(recipe.rounds)}

    def predict(image: Tensor) -> Tensor:
        return copy.eval()(image).argmax(dim=1)

    def step_loss(step: int) -> Tensor:
        generator = work.generator("self_training", step)
        image, label = labelled_batch(work, recipe, generator)
        if step < first:
            return segmentation_loss(network(image), label)
        if step in renewals:
            copy.load_state_dict(network.state_dict())
        other, predicted = unlabelled_batch(work, recipe, generator, predict)
        known, guessed = segmentation_loss(network(image), label), segmentation_loss(network(other), predicted)
        return known + recipe.weight * guessed

    return Training({"network": network}, step_loss, {"copy": copy})
