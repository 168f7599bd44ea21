"""Parameters: what is accepted, and what a wrong one is told."""

import itertools
import json
import re

import pytest

from clseg import paths
from clseg.errors import RequestError
from clseg.study.files import known_names, read_dataset, read_methods, read_profile, read_setting, read_study
from clseg.study.grid import expand
from clseg.study.parameters import FinetuneParameters, applicable, override_study, read_parameters, resolve


def test_every_yaml_file_of_the_project_is_valid():
    assert read_methods()
    for kind, read in (
        ("datasets", read_dataset),
        ("profiles", read_profile),
        ("settings", read_setting),
        ("studies", read_study),
    ):
        names = known_names(kind)
        assert names, kind
        for name in names:
            assert read(name).name == name


def test_every_method_resolves_on_every_data_set_and_profile():
    """But what needs positions is refused in one sentence where slices have none."""
    methods, refused = read_methods(), set()
    for dataset in map(read_dataset, known_names("datasets")):
        for profile, method in itertools.product(known_names("profiles"), methods):
            stages = methods[method].stages
            kinds = {getattr(s, "pairs", "") for s in stages if getattr(s, "threshold", None) is None}
            message = ""
            if dataset.threshold is None and "position" in kinds:
                message = f"method {method} contrasts positions, and data set {dataset.name} has no `threshold`; choose"
            if dataset.positions == "unknown" and any(stage.of_parts for stage in stages):
                message = (
                    f"method {method} contrasts parts of volumes, and data set {dataset.name} has no known positions; "
                )
                message += "choose"
            if message:
                with pytest.raises(RequestError, match=f"^{re.escape(message)} [^;]*$"):
                    resolve(dataset.name, profile, method)
                refused.add((dataset.name, method))
            else:
                found = resolve(dataset.name, profile, method)
                theirs = (dataset.name, profile, found.network.architecture) == ("acdc", "paper", "pcl")
                assert theirs or found.geometry == dataset.geometry[profile]
    assert {("hvsmr", "pcl"), ("isic2018", "pcl"), ("ph2", "pcl"), ("ph2", "gd")} <= refused
    assert resolve("ph2", "smoke", "pcl", overrides=["stages.0.threshold=0.2"]).stages[0].threshold == 0.2


CONTRAST, LOCAL, AUTOENCODER = ({"stage": name} for name in ("contrast", "local", "autoencoder"))
INSTANCE, PARTITION, CLUSTER = (CONTRAST | {"pairs": name} for name in ("instance", "partition", "cluster"))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([INSTANCE | {"threshold": 0.9}], "threshold has no effect with pairs instance"),
        ([INSTANCE | {"partitions": 6}], "partitions has no effect with pairs instance"),
        ([PARTITION | {"positives": "view"}], "positives has no effect with pairs partition"),
        (
            [AUTOENCODER, CLUSTER | {"clusters": 4, "cluster_distance": 1.0}],
            "clusters has no effect with a cluster_dist",
        ),
        ([LOCAL | {"partitions": 3}], "partitions has no effect with strategy lr"),
        ([INSTANCE | {"strategy": "gd-"}], "strategy has no effect with pairs instance; leave it at 'gd'"),
        ([PARTITION | {"strategy": "gcl", "set_of": 3}], "set_of has no effect with strategy gcl"),
        ([INSTANCE | {"set_of": 3}], "set_of has no effect with pairs instance; leave it at 2"),
        ([INSTANCE | {"final_learning_rate": 0.01}], "final_learning_rate has no effect with a constant schedule"),
        ([AUTOENCODER], "an autoencoder leaves the network as it was"),
        ([LOCAL, INSTANCE], "let 'local' be the last"),
        ([CLUSTER], "need an autoencoder stage before them"),
    ],
)
def test_stages_that_would_have_no_effect_are_refused(stages, message):
    """It would name another run with the same numbers, or a method that does nothing."""
    with pytest.raises(RequestError, match=message):
        resolve("phantom", "smoke", "gd", overrides=[f"stages={json.dumps(stages)}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe={recipe: self_training, average: 0.9}", "average has no effect with recipe self_training"),
        ("dataset.geometry.smoke.size=[32, 32]", "would have no effect; use geometry.size"),
        ("dataset.protocols.seeded.file=a.json", "would have no effect"),
    ],
)
def test_overrides_that_would_have_no_effect_are_refused(override, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        resolve("phantom", "smoke", "gd", overrides=[override])


def test_an_override_concerns_the_methods_that_read_it():
    methods = read_methods()
    told = ["stages.0.partitions=3", "stages.0.threshold=0.2", "recipe.average=0.9"]
    assert applicable(told, methods["gr"]) == told[2:]
    assert applicable(told, methods["gd"]) == [told[0], told[2]]
    assert applicable(told, methods["pcl"]) == told[1:]
    assert applicable(told, methods["self_training"]) == []
    changed = ["stages.0.pairs=position", *told]
    assert applicable(changed, methods["gr"]) == changed
    assert len(expand(read_study("quickstart"), "phantom", "smoke", told[:1]).finetune) > 3
    with pytest.raises(RequestError, match="no method of study quickstart has this stage, or reads this key"):
        expand(read_study("quickstart"), "phantom", "smoke", told[1:2])


def test_an_override_of_a_data_set_reaches_the_run():
    assert resolve("phantom", "smoke", "pcl", overrides=["dataset.threshold=0.05"]).stages[0].threshold == 0.05
    unknown = ["dataset.positions=unknown"]
    for method in ("gd", "matched-gd", "gd+ld", "pcl-partition"):
        with pytest.raises(RequestError, match="no known positions; choose a method with other pairs"):
            resolve("phantom", "smoke", method, overrides=unknown)
    assert resolve("phantom", "smoke", "gr+lr", overrides=unknown).dataset.positions == "unknown"
    steps = ["pretrain.steps=7", "pretrain.steps_of.local=5", "finetune.steps_of.4=9"]
    budget = resolve("phantom", "smoke", "gd+lr", overrides=steps)
    assert (budget.pretrain.steps_of, budget.finetune.steps_of[4]) == ({"local": 5}, 9)
    budget = resolve("phantom", "laptop", "gd+lr", overrides=["pretrain.steps=7"]).pretrain
    assert (budget.steps, budget.steps_of) == (7, {})
    assert resolve("phantom", "smoke", "gd", overrides=["protocol=folds"]).cross_validated


@pytest.mark.parametrize("profile", ["smoke", "laptop"])
def test_methods_with_the_same_recipe_are_fine_tuned_in_the_same_way(profile):
    """A profile that named methods would leave out one that is added."""
    found: dict[str, list] = {}
    for name, method in read_methods().items():
        found.setdefault(method.recipe.model_dump_json(), []).append(resolve("phantom", profile, name).recipe)
    assert len(found) < len(read_methods())
    assert all(recipe == some[0] for some in found.values() for recipe in some)


@pytest.mark.parametrize("profile", known_names("profiles"))
def test_methods_of_the_matched_arm_differ_in_who_is_alike_alone(profile):
    """And in the threshold, which positions alone have; before weak-to-strong consistency they are the same."""
    kinds = {"gr": "instance", "gd": "partition", "pcl": "position", "ufc": "cluster"}
    found = {name: resolve("acdc", profile, f"matched-{name}") for name in kinds}
    shared = found["gr"].stages[0].model_dump(exclude={"pairs"})
    for name, experiment in found.items():
        *before, own = experiment.stages
        assert [stage.stage for stage in before] == ["autoencoder"] * (name == "ufc")
        expected = {"pairs": kinds[name], "threshold": 0.35 if name == "pcl" else None}
        assert own.model_dump() == shared | expected, name
        assert experiment.model_copy(update={"method": "matched-gr", "stages": found["gr"].stages}) == found["gr"], name
        assert resolve("acdc", profile, f"matched-{name}+weak_to_strong").stages == experiment.stages


def test_published_settings_are_the_paper_profile_s():
    experiment = resolve("acdc", "paper", "gd+lr")
    assert experiment.network.filters == [16, 32, 64, 128, 128, 128]
    assert experiment.geometry.size == [192, 192]
    assert (experiment.pretrain.steps, experiment.finetune.steps, experiment.finetune.batch) == (10001, 10001, 20)
    contrast, local = experiment.stages
    assert (contrast.slices, contrast.partitions, contrast.temperature, contrast.learning_rate) == (16, 4, 0.1, 1e-3)
    assert (local.regions, local.size, local.negatives, local.decoder_blocks) == (13, 3, 5, 3)
    assert (contrast.answer, local.answer) == ("gd", "lr")  # in the names of run folders
    assert (experiment.network.architecture, experiment.network.norm_momentum) == ("glcl", 0.01)
    assert (experiment.dataset.normalisation.kind, experiment.dataset.phases) == ("percentiles", ["ED"])
    recipe = experiment.recipe
    assert (recipe.loss, recipe.optimiser, recipe.learning_rate, recipe.schedule) == ("dice", "adam", 1e-3, "constant")


def test_where_no_subject_validates_the_last_step_counts():
    with pytest.raises(RequestError, match="'best' needs validation subjects; semi has none"):
        resolve("acdc", "paper", "random", protocol="semi")
    assert resolve("acdc", "laptop", "random", protocol="semi").finetune.checkpoint == "last"
    for name in known_names("studies"):
        study = read_study(name).within(read_profile("paper"))
        for dataset in study.datasets:
            other = {"pretrain_dataset": "chd"} if (name, dataset) == ("pcl_transfer", "mmwhs_ct") else {}
            for run in expand(study.model_copy(update=other), dataset, "paper").finetune:
                assert run.finetune.checkpoint == "last" or getattr(run.experiment.division, "validation", True)


def test_zeng_et_al_have_their_own_published_setting():
    """That of their released code: wherever their methods are named, and for all methods of their studies."""
    experiment = resolve("acdc", "paper", "pcl")
    network, geometry, normalisation = experiment.network, experiment.geometry, experiment.dataset.normalisation
    assert (network.architecture, network.filters, network.norm_momentum) == ("pcl", [48, 96, 192, 384, 768], 0.1)
    assert (geometry.size, geometry.spacing_mm) == ([352, 352], 1.25)
    assert (normalisation.kind, normalisation.low, normalisation.high) == ("z_score", 0.0, 100.0)
    stage = experiment.stages[0]
    assert (stage.pairs, stage.threshold, stage.temperature, stage.denominator) == ("position", 0.35, 0.1, "all")
    assert (stage.head, stage.views, stage.slices) == ("pool", "pcl", 32)
    assert (stage.optimiser, stage.learning_rate, stage.schedule, stage.weight_decay) == ("sgd", 0.1, "cosine", 1e-5)
    assert experiment.pretrain.steps == 1902 // 32 * 300  # epochs of slices of both phases; of whole batches alone
    recipe, finetune = experiment.recipe, experiment.finetune
    assert (recipe.loss, recipe.augmentation, recipe.optimiser) == ("cross_entropy", "pcl", "adam")
    assert (recipe.schedule, recipe.learning_rate, recipe.final_learning_rate) == ("cosine", 5e-4, 5e-6)
    assert (recipe.weight_decay, finetune.batch) == (1e-5, 10)
    assert [finetune.steps_for(labelled) for labelled in (2, 6, 10)] == [400, 1100, 1900]  # 100 epochs
    chd = resolve("chd", "paper", "pcl")
    assert (chd.network.filters, chd.geometry.size) == ([32, 64, 128, 256, 512], [512, 512])
    assert (chd.stages[0].threshold, chd.pretrain.steps) == (0.1, 17525 // 32 * 300)
    assert (chd.dataset.normalisation.low, chd.dataset.normalisation.high) == (1.0, 99.0)
    assert (chd.recipe.augmentation, chd.recipe.learning_rate, chd.recipe.final_learning_rate) == ("none", 5e-5, 1e-6)
    for run in expand(read_study("pcl_semi"), "acdc", "paper").finetune:
        assert (run.experiment.network, run.experiment.geometry) == (network, geometry), run.method


def test_weights_of_another_network_are_refused_before_they_are_trained():
    with pytest.raises(RequestError, match=r"network.filters is \[48, .* on acdc, here \[32, .*pretrain_dataset=NAME"):
        expand(read_study("pcl_transfer"), "mmwhs_ct", "paper")


def test_a_transfer_takes_the_setting_of_each_data_set():
    (run, *_) = [run for run in expand(read_study("pcl_transfer"), "hvsmr", "paper").finetune if run.method == "pcl"]
    of_target, of_source = run.experiment.geometry, run.parent.experiment.geometry
    assert (of_target.spacing_mm, of_source.spacing_mm) == (0.7, 1.25)
    assert of_target.size == of_source.size == [352, 352]


def test_a_setting_stands_for_its_overrides():
    plain = resolve("phantom", "laptop", "gd", overrides=["setting=zeng"])
    assert plain.network.architecture == "pcl"
    narrow = resolve("phantom", "laptop", "gd", overrides=["setting=zeng", "network.filters=[8, 16, 32, 32, 32]"])
    assert narrow.network.filters == [8, 16, 32, 32, 32], "what comes later wins"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.step=5", "did you mean 'steps'"),
        ("pretrian.steps=5", "did you mean 'pretrain'"),
        ("stages.0.temprature=0.5", "did you mean 'temperature'"),
        ("stages.7.temperature=0.5", "valid are 0"),
        ("pretrain.steps=many", "pretrain.steps"),
        ("pretrain.steps=0", "greater than or equal to 1"),
        ("pretrain.steps=1.5", "pretrain.steps"),
        ("stages.0.temperature=-1", "stages.0"),
        ("geometry.size=[33, 32]", "multiple of 32"),
        ("recipe.loss=dise", "recipe.loss"),
        ("pretrain.steps", "KEY=VALUE"),
        ("pretrain.steps=[1", "not valid YAML"),
        ("pretrain.steps.more=1", "nothing is below it"),
        ("setting=zang", "did you mean 'zeng'"),
    ],
)
def test_a_wrong_override_names_itself_and_the_remedy(override, message):
    with pytest.raises(RequestError, match="(?s)" + message.replace("[", r"\[")) as caught:
        resolve("phantom", "smoke", "gd", overrides=[override])
    assert "\n" not in str(caught.value)


def test_numbers_may_be_written_with_an_exponent():
    assert resolve("phantom", "smoke", "gd", overrides=["recipe.learning_rate=1e-4"]).recipe.learning_rate == 1e-4


def test_an_override_changes_only_what_it_names():
    base, changed = (resolve("phantom", "smoke", "gd", overrides=o) for o in ([], ["stages.0.temperature=0.5"]))
    assert changed.stages[0].temperature == 0.5
    assert changed.model_copy(update={"stages": base.stages}) == base


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("phantm", "smoke", "gd"), "did you mean 'phantom'"),
        (("phantom", "smok", "gd"), "did you mean 'smoke'"),
        (("phantom", "smoke", "gd+lrr"), "did you mean 'gd"),
        (("phantom", "smoke", "gd", "chaitanya"), "protocol of data set phantom 'chaitanya'"),
        (("phantom", "smoke", "gd", "", ["stages.0.pairs=cluster"]), "need an autoencoder stage"),
        (("phantom", "smoke", "gd+lr", "", [], 3), "local works on 2-D slices only"),
    ],
)
def test_names_that_do_not_fit_are_told_what_does(names, message):
    with pytest.raises(RequestError, match=message.replace("+", r"\+")):
        resolve(*names)


def notebook(*cells):
    """The namespace of a notebook that has executed these cells."""
    namespace = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)
    return namespace


CELLS = [
    "import math\nscale = 2 * math.pi",
    'dataset: str = "phantom"\nprofile: str = "smoke"\nmethod: str = "gd"\nlabelled: int = 2',
]


def test_notebook_parameters_are_those_of_the_parameter_cells():
    assert read_parameters(notebook(*CELLS), FinetuneParameters).labelled == 2
    assert read_parameters(notebook(*CELLS, "# Parameters\nlabelled = 4"), FinetuneParameters).labelled == 4
    again = notebook(*CELLS, "for left_over in range(3):\n    pass", CELLS[1].replace("2", "8"))
    assert read_parameters({**notebook(CELLS[1]), "In": []}, FinetuneParameters).labelled == 2  # as under nbval
    assert read_parameters(again, FinetuneParameters).labelled == 8  # changed and run again in a live kernel


@pytest.mark.parametrize(
    "wrong",
    ["labeled = 2", "labelled = '2'", "labelled = 2.5", "overrides = 'pretrain.steps=1'", "draw = 0", "draw = None"],
)
def test_a_misspelt_or_mistyped_notebook_parameter_is_refused(wrong):
    with pytest.raises(RequestError, match=wrong.split()[0]):
        read_parameters(notebook(*CELLS, wrong), FinetuneParameters)


def test_overrides_of_a_stage_concern_only_methods_that_have_it():
    methods = read_methods()
    overrides = ["stages.1.size=1", "pretrain.steps=3"]
    assert applicable(overrides, methods["gd"]) == ["pretrain.steps=3"]
    assert applicable(overrides, methods["gd+lr"]) == overrides


def test_study_overrides_are_split_from_those_of_its_experiments():
    study, others = override_study(read_study("quickstart"), ["study.labelled=[3]", "pretrain.steps=2"])
    assert study.labelled == [3]
    assert others == ["pretrain.steps=2"]
    with pytest.raises(RequestError, match="did you mean 'labelled'"):
        override_study(study, ["study.labeled=[3]"])


def test_roots_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    monkeypatch.setenv("CLSEG_DATA", str(tmp_path / "d"))
    assert paths.runs_root() == tmp_path / "runs"
    assert paths.data_root() == tmp_path / "d"
    monkeypatch.delenv("CLSEG_OUT")
    assert paths.runs_root() == paths.PROJECT / "out" / "runs"
