"""Every study of `params/studies` can be run on every data set it names, and every method of `params/methods.yaml`."""

import numpy as np
import pytest

from clseg import paths
from clseg.errors import RequestError
from clseg.study import grid, runs
from clseg.study.files import known_names, read_methods, read_study
from clseg.study.parameters import FinetuneParameters, applicable

STUDIES = known_names("studies")
ROWS = {  # those that must exist
    "none": ["random"],
    "global": ["gr", "gd-", "gd"],
    "local": ["gr+lr", "gd+lr", "gd+ld"],
    "positional": ["pcl", "pcl-partition"],
    "cluster": ["ufc"],
    "pretext": ["rotation", "inpainting", "context_restoration", "pirl"],
    "semi-supervised": ["mixup", "self_training", "adversarial", "gan_augmentation", "mean_teacher"],
    "together": ["gd+lr+mixup", "gd+lr+self_training", "pcl+lr", "ufc+lr"],
    "ceiling": ["benchmark"],
}
OF_CHD = "pcl_transfer", "mmwhs_ct", "paper"  # a target whose network is that of CHD
FEW = ["finetune.steps=10", "finetune.validate_every=5", "pretrain.steps=6"]
FEW += ["dataset.options.subjects=12", "dataset.protocols.seeded.test=4", "dataset.protocols.seeded.validation=1"]


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_expands_on_every_data_set_it_names_in_every_profile(study):
    about = read_study(study)
    assert (paths.NOTEBOOKS / "scripts" / f"{about.notebook}.py").is_file()
    for dataset in about.datasets:
        for profile in ("smoke", "laptop", "paper"):
            source = {"pretrain_dataset": "chd"} if (study, dataset, profile) == OF_CHD else {}
            about = read_study(study).model_copy(update=source)
            plan = grid.expand(about, dataset, profile)
            assert {run.parameters.method for run in plan.finetune} >= set(about.methods)
            assert all(run.experiment.dataset.name == dataset for run in plan.finetune)
            source = about.pretrain_dataset or dataset
            assert all(run.experiment.dataset.name == source for run in plan.pretrain)
            assert {run.experiment.geometry.dimensions for run in plan.all} == {about.dimensions}


def test_the_tables_of_profile_laptop_are_in_one_precision():
    """bf16, as PROTOCOL.md says; but for the phantom and own scans."""
    for study in set(STUDIES) - {"own_data", "quickstart"}:
        about = read_study(study)
        for dataset in about.datasets:
            assert {run.experiment.precision for run in grid.expand(about, dataset, "laptop").all} == {"bf16"}, study


def test_every_row_of_the_design_is_there():
    assert {row for rows in ROWS.values() for row in rows} <= set(read_methods())


def train(method, dimensions=2):
    few = applicable(FEW, read_methods()[method])
    run = runs.finetune_run(
        FinetuneParameters(
            dataset="phantom",
            profile="smoke",
            method=method,
            dimensions=dimensions,
            labelled=0 if method == "benchmark" else 1,
            overrides=few,
        )
    )
    return runs.do(run)


def check(run):
    metrics = run.read("metrics")
    assert len(metrics) == 4 * 3
    assert np.isfinite(metrics[["dice", "hd95"]].to_numpy()).all()
    assert metrics["dice"].between(0, 1).all()
    assert np.isfinite(run.read("log")["loss"]).all()
    while (run := run.parent) is not None:
        assert np.isfinite(run.read("log")["loss"]).all()


@pytest.mark.parametrize("method", sorted(read_methods()))
def test_every_method_runs_on_the_phantom(method):
    check(train(method))


@pytest.mark.parametrize("method", ["random", "gr", "gd", "pcl", "ufc", "mixup", "self_training", "mean_teacher"])
def test_in_3d(method):
    run = train(method, dimensions=3)
    assert run.experiment.geometry.dimensions == 3
    check(run)


def test_what_is_for_slices_only_says_so_in_3d():
    with pytest.raises(RequestError, match="local works on 2-D slices only"):
        train("gd+lr", dimensions=3)
