"""Mean teacher: a student is to predict what the running average of its own weights predicts, labels or not.

Source: Tarvainen and Valpola, NeurIPS 2017; for segmentation Perone and Cohen-Adad, DLMIA 2018, and Yu et al., MICCAI
2019 (weight 0.1, decay 0.99).
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from clseg.loop import Training, Work
from clseg.recipes.average import follow, ramp_up
from clseg.recipes.supervised import drawn_batch, drawn_images, semi_supervised_loss
from clseg.settings import MeanTeacherRecipe

NOISE = 0.05  # standard deviation of the noise on images of about 0..1


def mean_teacher(work: Work, recipe: MeanTeacherRecipe) -> Training:
    """L(labelled) + weight exp(-5 (1 - t)²) mean (p - p')², p of the student, p' of the teacher.

    t goes from 0 to 1 in `ramp` of the steps. The mean runs over labelled and as many unlabelled slices, on which each
    of the two sees Gaussian noise of its own. The teacher is `network`, the average of the student's weights with decay
    `average` (`follow`); its batch-norm running averages are those of the batches that it sees itself. Raises
    `RequestError` without unlabelled slices.
    """
    segmentation_loss = semi_supervised_loss(work, recipe)
    network, student = work.network, deepcopy(work.network)

    def predict(model: nn.Module, image: Tensor) -> Tensor:
        return torch.cat([model(part) for part in image.split(work.slices)])  # labelled and unlabelled slices apart

    def draw(step: int) -> list[Tensor]:
        generator = work.generator("mean_teacher", step)
        image, label = drawn_batch(work, work.rows, recipe, generator)
        other = drawn_images(work, work.unlabelled, recipe, generator)
        image = torch.cat([image, other])
        noise = NOISE * torch.randn((2, *image.shape), generator=generator).to(work.device)
        follow(network, student, recipe.average, step, statistics=False)
        weight = recipe.weight * ramp_up(step, recipe.ramp * work.steps)
        return [image, label, noise, torch.tensor(weight).to(work.device)]

    def loss(image: Tensor, label: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            lesson = predict(network, image + noise[0]).float().softmax(dim=1)
        logits = predict(student, image + noise[1])
        difference = (logits.float().softmax(dim=1) - lesson).square().mean()
        return segmentation_loss(logits[: work.slices], label) + weight * difference

    return Training({"student": student}, draw, loss)
