"""Self-training: the segmenter learns from its own labels of the slices that have none.

Source: Bai et al., MICCAI 2017, with one weight for both losses; compared by Chaitanya et al., NeurIPS 2020.
*Deviation*: predicted labels are not refined by a conditional random field.
"""

from copy import deepcopy

from torch import Tensor

from clseg.loop import Training, Work
from clseg.recipes.supervised import drawn_batch, semi_supervised_loss
from clseg.settings import SelfTrainingRecipe


def self_training(work: Work, recipe: SelfTrainingRecipe) -> Training:
    """L(labelled) + weight L(unlabelled, labels of a frozen copy), as many slices of each.

    Up to `warm_up` of the steps there is the first term alone, from there on the copy is renewed at `rounds` equally
    spaced steps. It labels slices before they are augmented. Raises `RequestError` without unlabelled slices.
    """
    segmentation_loss = semi_supervised_loss(work, recipe)
    network, steps, first = work.network, work.steps, round(recipe.warm_up * work.steps)
    copy = deepcopy(network).requires_grad_(False)
    renewals = {first + (steps - first) * k // recipe.rounds for k in range(recipe.rounds)}

    def predict(image: Tensor) -> Tensor:
        return copy.eval()(image).max(dim=1).indices

    def draw(step: int) -> tuple[Tensor, ...]:
        generator = work.generator("self_training", step)
        known = drawn_batch(work, work.rows, recipe, generator)
        if step in renewals:
            copy.load_state_dict(network.state_dict())
        return known if step < first else (*known, *drawn_batch(work, work.unlabelled, recipe, generator, predict))

    def loss(image: Tensor, label: Tensor, other: Tensor | None = None, predicted: Tensor | None = None) -> Tensor:
        if other is None:
            return segmentation_loss(network(image), label)
        known, guessed = segmentation_loss(network(image), label), segmentation_loss(network(other), predicted)
        return known + recipe.weight * guessed

    return Training({"network": network}, draw, loss, steady=first, state={"copy": copy})
