"""The floors of the package: who may import whom, what decides numbers, and that the core works as its example says."""

import ast
import doctest
import graphlib
import shutil
import sys
from pathlib import Path
from typing import get_args

import pytest

import clseg.recipes
import clseg.stages
from clseg import digest, paths, settings, train
from clseg.study import runs
from clseg.study.parameters import FinetuneParameters
from clseg.study.schema import FLAT_STAGES

PACKAGE = Path(clseg.__file__).parent
CORE, STUDY, TOOLS = "core", "clseg.study", "clseg.tools"
PLAIN = {f"clseg.{name}" for name in ("pairs", "losses", "regions", "metrics", "stats")}
SCIENCE = {"torch", "numpy", "pandas", "scipy"}
# what `03_your_data` shows are the tools, what `00_start_here` shows is a study; the others need the core alone
LESSONS = {"00_start_here": {STUDY}, "01_data": {STUDY}, "03_your_data": {STUDY, TOOLS}}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(source):
    """All modules that a text imports, at its top or inside of functions, by their whole names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written with whole names"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(FILES)
            names |= inside or {node.module}
    return names


def ours(names):
    return {name for name in names if name.partition(".")[0] == "clseg"}


def floor(module):
    return next((place for place in (STUDY, TOOLS) if module.startswith(place)), CORE)


IMPORTS = {name: imported(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def test_the_core_imports_no_machinery_and_the_machinery_no_tools():
    above = {CORE: {STUDY, TOOLS}, STUDY: {TOOLS}, TOOLS: set()}
    start = {"clseg.__main__"}  # `python -m clseg` is the command line
    wrong = [
        f"{name} imports {module}"
        for name in set(IMPORTS) - start
        for module in ours(IMPORTS[name])
        if floor(module) in above[floor(name)]
    ]
    assert wrong == []
    assert {floor(name) for name in IMPORTS} == {CORE, STUDY, TOOLS}


def test_every_stage_and_recipe_has_settings_and_code():
    stages, recipes = (get_args(get_args(union)[0]) for union in (settings.Stage, settings.Recipe))
    names = {kind.model_fields["stage"].default for kind in stages}
    assert names == set(clseg.stages.STAGES) == set(get_args(settings.StageName))
    assert names == set(FLAT_STAGES) | clseg.stages.SHARED | {"autoencoder"}
    assert {kind.model_fields["recipe"].default for kind in recipes} == set(clseg.recipes.RECIPES)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_what_is_mathematics_needs_nothing_else_of_the_project(name):
    others = {module.partition(".")[0] for module in IMPORTS[name] - ours(IMPORTS[name])}
    assert others - sys.stdlib_module_names <= SCIENCE
    assert ours(IMPORTS[name]) <= PLAIN


def test_data_knows_nothing_of_training_and_the_loop_nothing_of_methods():
    plain = {"clseg.settings", "clseg.errors", "clseg.paths", "clseg.digest"}
    inside = {name for name in FILES if name.startswith("clseg.data")}
    assert set().union(*(ours(IMPORTS[name]) for name in inside)) <= inside | plain
    types = {"clseg.data.store", "clseg.models"}  # of annotations
    assert ours(IMPORTS["clseg.loop"]) <= {"clseg.graphs", "clseg.ranks", "clseg.settings"} | types
    assert ours(IMPORTS["clseg.settings"]) == {"clseg.errors"}


def test_no_module_imports_itself_through_others():
    order = [*graphlib.TopologicalSorter({name: ours(names) for name, names in IMPORTS.items()}).static_order()]
    assert order.index("clseg.pairs") < order.index("clseg.losses") < order.index("clseg.train")


@pytest.mark.parametrize("script", sorted((paths.NOTEBOOKS / "scripts").glob("[01]*.py")), ids=lambda path: path.stem)
def test_lessons_are_read_with_the_core_alone(script):
    source = script.read_text(encoding="utf-8").replace("\n%", "\n# %")
    assert {floor(name) for name in ours(imported(source))} - {CORE} <= LESSONS.get(script.stem, set())


# ------------------------------------------------------------------------------------------------- what decides numbers


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Changes a text in a file of a copy of the package, and tells of which runs the digest of the code changes."""
    copy = tmp_path / "clseg"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(digest, "PACKAGE", copy)

    def digests():
        digest._parsed.cache_clear()
        found = {}
        for method in ("random", "mixup", "mean_teacher", "gr", "gd+lr", "rotation", "ufc"):
            run = runs.finetune_run(FinetuneParameters(dataset="phantom", profile="smoke", method=method))
            recipe = run.experiment.recipe.recipe
            found |= {recipe: run.code} | {parent.stage.stage: parent.code for parent in run.ancestors}
        return found

    before = digests()

    def change(file, old, new):
        path = copy / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} is in {file} {text.count(old)} times"
        path.write_text(text.replace(old, new), encoding="utf-8")
        return {kind for kind, code in digests().items() if code != before[kind]}

    yield change
    digest._parsed.cache_clear()


RECIPES = {"supervised", "mean_teacher"}
STAGES = {"contrast", "local", "rotation", "autoencoder"}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("losses.py", "s = z @ z.T  # [B, B]", "s = z @ z.T  # cosines over temperature [B, B]"),
        ("losses.py", "s = z @ z.T  # [B, B]", "s = (\n            z @ z.T\n        )"),
        ("losses.py", "Contrastive loss of a batch:", "The contrastive loss of one batch:"),
        ("losses.py", '"""The contrastive loss, its local form', '"""A contrastive loss, its local form'),
        ("recipes/evaluation.py", "Class probabilities of a volume of the store", "What a network says of a volume"),
        ("plots.py", "import numpy as np", "import numpy as np\n\nLARGER = 1.2"),
        ("stats.py", "import numpy as np", "import numpy as np\n\nMARGIN = 0.03"),
        ("tools/cli.py", "do a study: its pre-trainings", "make a study: its pre-trainings"),
        ("study/grid.py", "TRIES = 3", "TRIES = 5"),
        ("errors.py", "valid are", "known are"),
        ("paths.py", '"paper_figures"  #', '"results"  #'),
        ("settings.py", "temperature: Positive = 0.07", "temperature: Positive = 0.08"),  # runs have it in their key
    ],
)
def test_what_decides_no_number_leaves_every_digest(changed, file, old, new):
    assert changed(file, old, new) == set()


@pytest.mark.parametrize(
    ("file", "old", "new", "kinds"),
    [
        ("losses.py", "s = z @ z.T  # [B, B]", "s = 2 * z @ z.T", RECIPES | {"contrast", "local", "rotation"}),
        ("metrics.py", "np.percentile(distances, 95)", "np.percentile(distances, 90)", RECIPES | STAGES),
        ("loop.py", "momentum=0.9", "momentum=0.8", RECIPES | STAGES),
        ("data/splits.py", "from clseg.errors", "SHIFT = 1\nfrom clseg.errors", RECIPES | STAGES),
        ("recipes/mean_teacher.py", "NOISE = 0.05", "NOISE = 0.04", {"mean_teacher"}),
        ("stages/local.py", "image_pairs = []", "image_pairs = list()", {"local"}),
        ("stages/contrast.py", "for augmented in views]", "for augmented in views[::-1]]", {"contrast"}),
        ("cluster.py", "LARGEST = 20_000", "LARGEST = 10_000", {"contrast"}),
        ("stages/autoencoder.py", "(log_variance / 2)", "(log_variance / 3)", {"autoencoder"}),
        ("stages/pretext.py", "image.rot90(k, (2, 3))", "image.rot90(-k, (2, 3))", {"rotation"}),
    ],
)
def test_what_decides_numbers_changes_the_digest_of_what_uses_it(changed, file, old, new, kinds):
    assert changed(file, old, new) == kinds


# ---------------------------------------------------------------------------------------------------- without machinery


def test_the_study_in_ten_lines_is_as_the_docstring_says(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    found = doctest.testmod(train, raise_on_error=False)
    assert found.attempted >= 10
    assert found.failed == 0
