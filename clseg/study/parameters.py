"""The parameters of a run: names of data set, profile and method, put together and overridden."""

import ast
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal

from clseg import paths
from clseg.errors import RequestError, nearest, reading
from clseg.settings import AnyStrict, Count, Folds, Natural, SplitsFileProtocol, Strict
from clseg.study.files import plain, read_as, read_dataset, read_methods, read_profile, read_setting, validated
from clseg.study.schema import OVERRIDABLE, Experiment, MethodConfig, StudyConfig

SETTING = "setting="  # an override that stands for several: params/settings
RECIPE = "recipe:"  # in the `set` of a profile: all methods with this recipe


class RunParameters(Strict):
    dataset: str
    profile: str
    method: str
    protocol: str = ""
    dimensions: Literal[2, 3] = 2
    seed: Natural = 0
    overrides: list[str] = []
    variant: str = ""  # an override that is also named in the results of an ablation
    study: str = ""

    def experiment(self) -> Experiment:
        overrides = [*self.overrides, *([self.variant] if self.variant else [])]
        source = getattr(self, "pretrain_dataset", "")
        return resolve(self.dataset, self.profile, self.method, self.protocol, overrides, self.dimensions, source)


class PretrainParameters(RunParameters):
    draw: Count = 1  # whose test subjects it must not see, where draws differ in them
    stage: Natural = 0  # of the method; those before it are its parents


class FinetuneParameters(RunParameters):
    labelled: Natural = 1  # subjects with labels; 0 stands for all
    draw: Count = 1  # of those subjects
    pretrain_dataset: str = ""  # where it is another one


class DataParameters(Strict):  # of the notebook that shows a data set
    dataset: str
    profile: str
    labelled: Count
    draws: Count


class OwnDataParameters(Strict):  # of the notebook for a folder of one's own
    folder: str
    profile: str
    labelled: Count
    method: str


class FigureParameters(Strict):  # which study's table a figure notebook reads
    study: str
    dataset: str
    profile: str


def _assigned(cell: str) -> list[str]:
    """The names a cell assigns if it assigns literals and does nothing else, as parameter cells do."""
    try:
        statements: Any = ast.parse(cell).body
        for statement in statements:
            ast.literal_eval(statement.value)
        return [target.id for s in statements for target in getattr(s, "targets", None) or [s.target]]
    except (SyntaxError, AttributeError, TypeError, ValueError):
        return []


def read_parameters(namespace: Mapping[str, Any], schema: type[AnyStrict]) -> AnyStrict:
    """The typed parameters of a notebook from its namespace (`globals()`). Raises `RequestError`.

    Those are the fields of the schema, and whatever else cells of nothing but literal assignments assigned (the
    parameters cell, the one papermill injects): a misspelt one fails here. Under nbval only the fields are looked at.
    """
    names = {*schema.model_fields, *(name for cell in namespace.get("In", ()) for name in _assigned(cell))}
    return validated(schema, {name: namespace[name] for name in names if name in namespace}, "notebook parameters")


@lru_cache(maxsize=1024)
def parse_override(text: str) -> tuple[list[str], Any]:
    """'a.b=VALUE' as path and YAML value."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RequestError(f"--set {text!r}: must read KEY=VALUE, for example pretrain.steps=100")
    with reading(f"--set {text!r}", "YAML", "quote the value"):
        parsed = plain(value)
    with suppress(ValueError):
        parsed = float(parsed) if isinstance(parsed, str) else parsed  # YAML takes 1e-4 for a word
    return key.strip().split("."), parsed


def override(tree: Any, key: list[str], value: Any) -> Any:
    """A copy of a nested tree of dicts and lists with one value replaced; an unknown key is a `RequestError`."""
    copy = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree)) if isinstance(tree, list) else {}
    match = next((k for k in copy if str(k) == key[0]), None)
    if match is None:
        raise RequestError(f"--set: unknown key {key[0]!r}, {nearest(key[0], copy) if copy else 'nothing is below it'}")
    copy[match] = value if len(key) == 1 else override(copy[match], key[1:], value)
    return list(copy.values()) if isinstance(tree, list) else copy


def resolve(
    dataset: str,
    profile: str,
    method: str,
    protocol: str = "",
    overrides: Iterable[str] = (),
    dimensions: int = 2,
    pretrain_dataset: str = "",
) -> Experiment:
    """Data set, profile and method by name, put together and overridden. Raises `RequestError`."""
    data, budget, methods = read_dataset(dataset), read_profile(profile), read_methods()
    source = read_dataset(pretrain_dataset) if pretrain_dataset else data  # of the stages
    if not data.protocols:
        raise RequestError(f"data set {data.name}: has no `protocols`, which say who is tested; add one")
    protocol, folds = protocol or next(iter(data.protocols)), None
    if own := methods.get(method):  # one that is not known is refused below
        scaled = [text for who in ("*", RECIPE + own.recipe.recipe, method) for text in budget.set.get(who, ())]
        places = budget.name, f"{budget.name}.{data.name}"
        overrides = [*applicable(scaled, own), *overrides]
        overrides = [text for given in overrides for text in _spelt_out(given, places, own)]
    overrides = list(overrides)
    for key, value in map(parse_override, overrides):
        if key == ["protocol"] and isinstance(value, str):
            protocol = value
    if isinstance(division := data.protocols.get(protocol), SplitsFileProtocol):
        folds = read_as(Folds, paths.data_root() / data.folder / division.file)
    # the runs of a grid share few experiments; files that did not change are the same objects
    read = tuple(map(_Same, (data, budget, methods, source, folds)))
    return _resolve(read, (dataset, profile, method), protocol, tuple(overrides), dimensions)


class _Same:
    """Stands for an object, and is equal to what stands for the same one."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


@lru_cache(maxsize=1024)
def _resolve(
    read: tuple[_Same, ...], names: tuple[str, str, str], protocol: str, overrides: tuple[str, ...], dimensions: int
) -> Experiment:
    data, budget, methods, source, folds = (same.it for same in read)
    dataset, profile, method = names
    geometry = data.geometry if dimensions == 2 else data.geometry_3d
    for what, name, valid in (
        ("method", method, methods),
        (f"protocol of data set {data.name}", protocol, data.protocols),
        (f"{dimensions}-D geometry of data set {data.name} for profile", budget.name, geometry or ["none"]),
    ):
        if name not in valid:
            raise RequestError(f"{what} {name!r} is not known, {nearest(name, valid)}")
    tree = budget.model_dump(exclude={"name", "title", "network_3d", "set", "draws"}) | methods[method].model_dump(
        exclude={"title"}
    )
    tree |= {"method": method, "profile": budget.name, "protocol": protocol, "unlabelled": None}
    tree |= {"dataset": data.model_dump(), "geometry": geometry[budget.name].model_dump()}
    if folds is not None:  # what the file holds decides, not its name
        tree["dataset"]["protocols"][protocol] |= {"file": "", "folds": [fold.model_dump() for fold in folds]}
    if dimensions == 3:
        tree["network"] = budget.network_3d.model_dump()
    for text in overrides:
        key, value = parse_override(text)
        if key[0] not in OVERRIDABLE:
            full = _full_keys(key[0]) if len(key) == 1 else []
            hint = f"its full name is {' or '.join(full)}" if full else nearest(key[0], OVERRIDABLE)
            raise RequestError(f"--set {text}: unknown key {key[0]!r}, {hint}")
        if key[0] == "dataset" and key[1:2] in (["geometry"], ["geometry_3d"]):
            own = ".".join(["geometry", *(key[3:] or ["KEY"])])
            raise RequestError(f"--set {text}: would have no effect; use {own}, which is of this profile")
        if key[:2] == ["dataset", "protocols"] and key[3:] == ["file"]:
            raise RequestError(f"--set {text}: would have no effect; change it in the file of the data set")
        if len(key) == 3 and key[0] in ("pretrain", "finetune") and key[1] == "steps_of":  # one that need not be there
            key, value = key[:2], tree[key[0]]["steps_of"] | {int(key[2]) if key[2].isdigit() else key[2]: value}
        tree = override(tree, key, value)
        if key in (["finetune", "steps"], ["pretrain", "steps"]):  # for all numbers of labels, or stages
            tree = override(tree, [key[0], "steps_of"], {})  # unless the next one says more
    experiment, stages = validated(Experiment, tree, f"{dataset}, {profile}, {method}"), []
    source = experiment.dataset if source is data else source
    for stage in experiment.stages:
        if source.positions == "unknown" and stage.of_parts:
            wrong = f"method {method} contrasts parts of volumes, and data set {source.name} has no known positions"
            raise RequestError(f"{wrong}; choose a method with other pairs")
        if getattr(stage, "pairs", "") == "position" and stage.threshold is None:
            if source.threshold is None:
                wrong = f"method {method} contrasts positions, and data set {source.name} has no `threshold`"
                raise RequestError(f"{wrong}; choose a method with other pairs, or set dataset.threshold")
            stage = stage.model_copy(update={"threshold": source.threshold})
        stages.append(stage)
    return experiment.model_copy(update={"stages": stages})


def _spelt_out(text: str, places: tuple[str, ...], method: MethodConfig) -> Iterable[str]:
    """An override, or those that `setting=NAME` stands for: of a profile, and of a profile and data set (`places`)."""
    if not text.startswith(SETTING):
        return [text]
    setting = read_setting(text.removeprefix(SETTING))
    if not (there := [place for place in places if place in setting.set]):
        raise RequestError(f"--set {text}: it says nothing of {' or '.join(places)}; it has {', '.join(setting.set)}")
    return applicable([one for place in there for one in setting.set[place]], method)


def _full_keys(name: str) -> list[str]:
    """The keys of a smoke run of any method that end with a name, such as `stages.0.temperature`."""
    methods = read_methods().values()
    trees = [method.model_dump(exclude={"title"}) for method in methods]
    trees.append(read_profile("smoke").model_dump(include={"network", "pretrain", "finetune"}))

    def below(tree: Any, at: str) -> Iterable[str]:
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        for key, value in parts:
            yield from ([f"{at}{key}"] if key == name else []) + [*below(value, f"{at}{key}.")]

    return list(dict.fromkeys(key for tree in trees for key in below(tree, "")))


def override_study(study: StudyConfig, overrides: Iterable[str]) -> tuple[StudyConfig, list[str]]:
    """The study with its `study.KEY=VALUE` overrides applied, and the overrides that concern its experiments."""
    tree, others = study.model_dump(), []
    for text in overrides:
        key, value = parse_override(text)
        if key[0] == "study" and len(key) > 1:
            tree = override(tree, key[1:], value)
        else:
            others.append(text)
    return validated(StudyConfig, tree, f"study {study.name}"), others


DECIDING = {"pairs", "strategy", "schedule", "cluster_distance", "recipe"}  # which other keys are read


def applicable(overrides: Iterable[str], method: MethodConfig) -> list[str]:
    """The overrides that concern a method: those of stages it does not have are left out, and of keys that its pairs,
    its strategy or its recipe do not read."""
    keys = [(text, parse_override(text)[0]) for text in overrides]
    decided = {tuple(key[:-1]) for _, key in keys if key[-1] in DECIDING}

    def concerns(key: list[str]) -> bool:
        if key[0] == "stages" and len(key) > 1 and key[1].isdigit() and int(key[1]) >= len(method.stages):
            return False
        if tuple(key[:-1]) in decided or key[-1] == "final_learning_rate":  # a profile may set the schedule
            return True
        if key[0] == "stages" and len(key) == 3 and key[1].isdigit():
            return key[2] not in method.stages[int(key[1])].unread
        return key[0] != "recipe" or key[-1] not in method.recipe.unread

    return [text for text, key in keys if concerns(key)]
