"""Mean teacher: a student is to predict what the running average of its own weights predicts, labels or not.

Source: Tarvainen and Valpola, NeurIPS 2017; for segmentation Perone and Cohen-Adad, DLMIA 2018, and Yu et al., MICCAI
2019 (weight 0.1, decay 0.99).
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from clseg.loop import Training, Work
from clseg.recipes.supervised import background, drawn_batch, semi_supervised_loss
from clseg.settings import MeanTeacherRecipe

NOISE = 0.05  # standard deviation of the noise on images of about 0..1


def mean_teacher(work: Work, recipe: MeanTeacherRecipe) -> Training:
    """L(labelled) + weight exp(-5 (1 - t)²) mean (p - p')², p of the student, p' of the teacher.

    t goes from 0 to 1 in `ramp` of the steps. The mean runs over labelled and as many unlabelled slices, on which each
    of the two sees Gaussian noise of its own. The teacher is `network`: before step s = 0, 1, … its weights w' become
    a w' + (1 - a) w, a = min(1 - 1 / (s + 1), decay), w the student's; its batch-norm running averages are those of
    the batches that it sees itself. Raises `RequestError` without unlabelled slices.
    """
    segmentation_loss = semi_supervised_loss(work, recipe)
    network, student = work.network, deepcopy(work.network)

    def predict(model: nn.Module, image: Tensor) -> Tensor:
        return torch.cat([model(part) for part in image.split(work.slices)])  # labelled and unlabelled slices apart

    def step_loss(step: int) -> Tensor:
        generator = work.generator("mean_teacher", step)
        image, label = drawn_batch(work, work.rows, recipe, generator)
        other, _ = drawn_batch(work, work.unlabelled, recipe, generator, background)
        image = torch.cat([image, other])
        noise = NOISE * torch.randn((2, *image.shape), generator=generator).to(work.device)
        with torch.no_grad():
            share = 1 - min(1 - 1 / (step + 1), recipe.decay)
            for mine, theirs in zip(network.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, share)
            lesson = predict(network, image + noise[0]).float().softmax(dim=1)
        logits = predict(student, image + noise[1])
        difference = (logits.float().softmax(dim=1) - lesson).square().mean()
        weight = recipe.weight * math.exp(-5 * (1 - min(step / (recipe.ramp * work.steps), 1)) ** 2)
        return segmentation_loss(logits[: work.slices], label) + weight * difference

    return Training({"student": student}, step_loss)
