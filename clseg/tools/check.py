"""What is in a folder of scans, what is wrong with it, and how a study would use it: every volume is opened once.

Decathlon and nnU-Net v2 folders name their files in `dataset.json`; elsewhere images and masks are paired by name. The
proposed geometry keeps the median spacing and holds the median volume and the labels of 95 % of the volumes.
"""

import json
import os
import re
import shlex
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import comb
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError
from tqdm.auto import tqdm

from clseg.data.formats import (
    HEADER_TEXTS,
    MOST_VALUES,
    PICTURES,
    VOLUMES,
    class_names,
    is_volume,
    label_values,
    matching,
    read,
    scan,
    usual_slice_axis,
)
from clseg.data.prepare import normalise, require_new
from clseg.data.volume import Volume, VolumeRef
from clseg.errors import RequestError, once, reading, writing
from clseg.settings import DatasetConfig, Folds, Geometry, Normalisation, SeededProtocol, SplitsFileProtocol
from clseg.study.archive import write_atomically
from clseg.study.estimate import pass_cost, weights_in
from clseg.study.files import known_names, read_methods, read_profile, read_study

FILES = (*VOLUMES, *PICTURES)
MASK = re.compile(
    r"(?<![a-z])(masks?|labels?(tr)?|seg(mentations?)?|gt|ground_?truth|manual|annotations?)(?![a-z])", re.I
)
LAYOUTS = "dataset.json with imagesTr and labelsTr, or images/NAME.nii.gz (or .png) with masks/NAME.nii.gz"
LARGEST = 256  # pixels of a proposed grid


@dataclass
class Report:
    """`problems` name a file and a remedy, `remarks` say what will be done; `dataset` is None if nothing is usable."""

    folder: str
    layout: str
    volumes: list[dict[str, Any]] = field(default_factory=list)  # those that can be used
    classes: list[dict[str, Any]] = field(default_factory=list)  # name, value, voxels, subjects
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    dataset: DatasetConfig | None = None

    def tree(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"dataset": self.dataset.model_dump() if self.dataset else None}

    def text(self) -> str:
        """For people: what is there, and what will be done about it."""
        rows, lines = self.volumes, [f"{Path(self.folder).name}: {self.layout}"]
        if rows:
            labelled, turned = sum(v["labelled"] for v in rows), Counter(v["orientation"] for v in rows)
            orders = ", ".join(f"{order or 'none'} ({n})" for order, n in turned.most_common())
            low, high = ([v[key] for v in rows] for key in ("low", "high"))
            usual = f"of the median volume {np.median(low):g} to {np.median(high):g}"
            lines += [f"  volumes      {len(rows)} usable, {labelled} labelled, {rows[0]['channels']} channel(s)"]
            lines += [f"  shape        {_ranges([v['shape'] for v in rows])}"]
            lines += [f"  spacing mm   {_ranges([v['spacing_mm'] for v in rows if v['spacing_mm']])}"]
            lines += [f"  orientation  {orders}", f"  intensities  {min(low):g} to {max(high):g}; {usual}"]
            for c in self.classes:
                about = f"{c['voxels']:,} voxels in {c['subjects']} of {labelled} labelled"
                lines.append(f"  class {c['value']:<6} {c['name']}: {about}")
        return "\n".join([*lines, *(f"  - {remark}" for remark in self.remarks)])

    def study(self, file: str) -> str:
        """The command of a study that the labelled subjects which are there can fill, on the data set file."""
        protocol = self.dataset.protocols["seeded"]
        held_out = protocol.test + protocol.validation
        most = self._labelled - held_out
        labelled = [count for count in (1, 2, 4, 8, 16, 32) if count <= most]
        draws = list(range(1, min(max(comb(most, count) for count in labelled), 3) + 1))
        methods = ["random", *self._methods(held_out + labelled[-1])]
        changes = {} if methods == read_study("own_data").methods else {"methods": methods}
        return self._command(file, changes | {"labelled": labelled, "draws": draws})

    def last(self, file: str) -> str:
        """The command that trains on all masks in the way that the README recommends, for weights without a score."""
        methods = self._methods(self._labelled)[-1:]
        return self._command(file, {"protocol": "all_masks", "methods": methods, "labelled": [self._labelled]})

    @property
    def _labelled(self) -> int:
        return len({v["subject"] for v in self.volumes if v["labelled"]})

    def _methods(self, used: int) -> list[str]:
        """What may help where so many subjects are labelled or held out; `weak_to_strong` needs others."""
        parts = self.dataset.positions == "known" and max(v["shape"][0] for v in self.volumes) >= 4  # of matched-gd
        before = "matched-gd" if parts else "matched-gr"
        others = len({v["subject"] for v in self.volumes}) > used
        return ["weak_to_strong", f"{before}+weak_to_strong"] if others else [before]

    def _command(self, file: str, changes: dict[str, Any]) -> str:
        """That of study `own_data` on the data set file, with these changes."""
        words = ["clseg", "run", "own_data", "--dataset", file, "--profile", "laptop"]
        for key, value in changes.items():
            words += ["--set", f"study.{key}={value}".replace(" ", "").replace("'", "")]
        return shlex.join(words)


def _ranges(rows: list[list[float]]) -> str:
    spans = zip("zyx", np.array(rows).T, strict=True) if rows else []
    named = [f"{axis} {n.min():.4g} to {n.max():.4g} (median {np.median(n):.4g})" for axis, n in spans]
    return ", ".join(named) or "none in the files"


def _files(folder: Path) -> list[str]:
    """Every image file below a folder, as a relative path; hidden ones are left out, and folders seen before."""
    found, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(base).relative_to(folder)
        found += [(here / name).as_posix() for name in names if name.lower().endswith(FILES) and name[0] != "."]
    return sorted(found)


def _ending(path: str) -> str:
    return next(path[-len(end) :] for end in FILES if path.lower().endswith(end))


def _templates(files: list[str]) -> list[str]:
    """Texts with {subject} for what differs between files: in their names, or in the name of a folder and after it."""
    found: dict[str, None] = {}
    groups: dict[str, list[str]] = {}
    for path in files:
        groups.setdefault(path.rpartition("/")[0], []).append(path)
    for some in groups.values():
        ending = Counter(map(_ending, some)).most_common(1)[0][0]
        stems = [path.removesuffix(_ending(path)) for path in some]
        common = os.path.commonprefix(stems)  # noqa: RUF071 - by characters is meant
        for start in dict.fromkeys((common.rfind("/") + 1, max(map(common.rfind, "/_-.")) + 1)):
            rests = [stem[start:] for stem in stems]
            last = os.path.commonprefix([rest[::-1] for rest in rests])[::-1]  # noqa: RUF071
            ends = [last[match.start() :] for match in re.finditer(r"[/_.-]", last)] + [""]
            for end in ends if len(some) > 1 else ():
                if len(end) < min(map(len, rests)):
                    found[f"{common[:start]}{{subject}}{end}{ending}"] = None
    folders: Counter[str] = Counter()  # a folder of each subject, whose name may be in those of its files
    for path in files:
        parts = path.split("/")
        for level, name in enumerate(parts[:-1]):
            rest = "/".join(parts[level + 1 :]).replace(name, "{subject}")
            folders["/".join([*parts[:level], "{subject}", rest])] += 1
    return [*found, *(text for text, count in folders.items() if count > 1)]


def _pairs(files: list[str], at_most: int = 400) -> tuple[str, str, dict[str, str], dict[str, str]] | None:
    """Texts with {subject} of most images and their masks, and what looks like them; None where there are none."""
    masks = [path for path in files if MASK.search(path)]
    others = sorted({*files} - {*masks})
    best, images = None, [(text, matching(text, others)) for text in _templates(others)[:at_most]]
    for label_text, labels in [(text, matching(text, masks)) for text in _templates(masks)[:at_most]]:
        for image_text, found in images:
            both = len(labels.keys() & found.keys())
            if both and (best is None or both > best[0]):
                best = both, (image_text, label_text, found, labels)
    return best[1] if best else None


def _seen(files: list[str]) -> str:
    """In words, where files lie."""
    groups: dict[str, list[str]] = {}
    for path in files:
        groups.setdefault(path.rpartition("/")[0] or ".", []).append(path)
    most = sorted(groups.items(), key=lambda group: -len(group[1]))[:3]
    return ", ".join(f"{len(some)} in {where} (such as {some[0]})" for where, some in most) or "no image files"


def _draft(folder: Path, name: str, options: dict[str, Any]) -> tuple[str, DatasetConfig, list[str]]:
    """The layout in words, a data set whose files can be read, and problems; classes and geometry are still open."""
    fields: dict[str, Any] = {"name": name, "title": f"own data: {folder.name}", "folder": str(folder), "geometry": {}}
    fields["description"] = "Proposed by `clseg check`. Every volume counts as a subject of its own."
    fields["protocols"] = {"seeded": SeededProtocol(kind="seeded", test=1, validation=1)}
    if not folder.is_dir():
        raise RequestError(f"{folder}: is not a folder; name the one that holds {LAYOUTS}")
    if (path := folder / "dataset.json").exists():
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            if "ignore" in json.loads(path.read_text(encoding="utf-8-sig"))["labels"]:
                options = {"undeclared": "background"} | options
        given = {"options": options} if options else {}
        return "dataset.json (Decathlon or nnU-Net v2)", DatasetConfig(adapter="msd", **given, **fields), []
    files, problems = _files(folder), []
    if not {"images", "labels"} <= options.keys():
        if (found := _pairs(files)) is None:
            how = (
                "name them alike, or say how with --set options.images=TEXT --set options.labels=TEXT, where {subject} "
            )
            how += f"stands for what both names share; or lay it out as {LAYOUTS}"
            told = f"no image and mask belong together by their names: there are {_seen(files)}"
            raise RequestError(f"{folder}: {told}; {how}")
        images, labels, *used = found
        rest = sorted({*files} - {path for some in used for path in some.values()})
        if more := _pairs(rest):
            places = [text.rpartition("{subject}")[0].rstrip("/") or "." for text in (images, more[0])]
            what = f"images and masks are in {places[0]} and in {places[1]}, and only those of {places[0]} are read"
            problems.append(f"{folder}: {what}; put all into one folder, or check each part as a folder of its own")
        options = {"images": images, "labels": labels} | options
    draft = DatasetConfig(adapter="pairs", options=options, **fields)
    if draft.photographs:
        draft = draft.model_copy(update={"channels": 3, "normalisation": Normalisation(low=0.0, high=100.0)})
    return f"images {options['images']} and masks {options['labels']}", draft, problems


def _mask_values(refs: list[VolumeRef], draft: DatasetConfig) -> tuple[set[int], dict[VolumeRef, str]]:
    """The values of all masks that can be classes, and of the others what is wrong."""
    values, faults = set(), {}
    for ref in refs:
        if ref.label is None or ref.label in ref.images:
            continue
        try:
            own = {int(value) for value in label_values(ref, draft.options)}
            if len(own) > MOST_VALUES and not draft.classes:
                remedy = "give the mask plain classes, or declare `classes` in a data set file"
                raise RequestError(f"{ref.label}: the mask holds {len(own)} values, as an image does; {remedy}")
            values |= own
        except RequestError as error:
            faults[ref] = str(error)
    return values, faults


def _ignored(values: set[int], declared: dict[int, str]) -> list[int]:
    """Values that are no classes but mark voxels to leave out, as is common: -1, and 255 beside 1, 2, ..., n."""
    others = sorted(value for value in values if 0 < value < 255)
    usual = {-1} | ({255} if others and others == [*range(1, others[-1] + 1)] else set())
    unknown = values - {0} - {*declared} if declared else {value for value in values if value < 0} | ({255} & values)
    return sorted(unknown) if unknown <= usual else []


def _about(volume: Volume, ref: VolumeRef, dataset: DatasetConfig) -> dict[str, Any]:
    """A row of `Report.volumes`. `field_mm`: side of a centred square that holds it, `needed_mm`: its labels."""
    image, label, spacing_mm = volume.image, volume.label, volume.spacing_mm
    grey = dataset.photographs and (image[:1] == image).all()
    about = {"subject": ref.subject, "file": ref.source, "labelled": label is not None}
    about |= {"channels": 1 if grey else len(image), "shape": list(image.shape[1:]), "spacing_mm": spacing_mm}
    about["orientation"] = "" if volume.affine is None else "".join(nib.aff2axcodes(volume.affine))
    about |= {"slice_axis": volume.slice_axis, "low": float(image.min()), "high": float(image.max())}
    in_plane_mm = spacing_mm[1:] if spacing_mm else (1.0, 1.0)
    about["field_mm"] = max(n * mm for n, mm in zip(image.shape[2:], in_plane_mm, strict=True))
    if label is not None:
        about["voxels"] = np.bincount(label.ravel(), minlength=len(dataset.classes) + 1)[1:].tolist()
        places = [(np.flatnonzero(label.any(axis=others)), axis) for axis, others in ((1, (0, 2)), (2, (0, 1)))]
        reach_px = [max(np.abs(2 * at - label.shape[axis] + 1), default=-1) + 1 for at, axis in places]
        about["needed_mm"] = float(max(px * mm for px, mm in zip(reach_px, in_plane_mm, strict=True)))
    return about


def propose(dataset: DatasetConfig, volumes: list[dict[str, Any]]) -> DatasetConfig:
    """The data set with geometry, positions and protocol from its volumes (rows of `Report.volumes`)."""
    labelled = sum(v["labelled"] for v in volumes)
    test, validation = (max(1, round(share * labelled)) for share in (0.3, 0.1))
    changes: dict[str, Any] = {"channels": volumes[0]["channels"]}
    sizes = {"seeded": (test, validation), "all_masks": (0, 0)}
    changes["protocols"] = {k: SeededProtocol(kind="seeded", test=t, validation=v) for k, (t, v) in sizes.items()}
    if Path(dataset.folder, "splits_final.json").exists():
        changes["protocols"]["nnunet"] = SplitsFileProtocol(kind="splits_file")
    slices, *_ = np.median([v["shape"] for v in volumes], axis=0)
    field_mm = np.median([v["field_mm"] for v in volumes])
    spacings = np.array([v["spacing_mm"] for v in volumes if v["spacing_mm"]])
    pixel_mm = np.median(spacings[:, 1:].mean(1)) if len(spacings) else 1.0
    if len(spacings) and labelled:
        field_mm = max(field_mm, np.percentile([v["needed_mm"] for v in volumes if v["labelled"]], 95))
    whole = 32 * int(np.ceil(round(field_mm / pixel_mm, 3) / 32))
    sides = {"smoke": 32, "laptop": min(64, whole), "paper": min(LARGEST, whole)}
    if not len(spacings):
        geometry = {name: Geometry(size=[side, side], resize=True) for name, side in sides.items()}
        return dataset.model_copy(update=changes | {"geometry": geometry, "positions": "unknown"})
    exact_mm = {name: float(max(pixel_mm, field_mm / side)) for name, side in sides.items()}
    mm = {name: round(value, 3) or value for name, value in exact_mm.items()}
    changes["geometry"] = {name: Geometry(size=[side, side], spacing_mm=mm[name]) for name, side in sides.items()}
    if slices >= 8:
        slice_mm, changes["geometry_3d"] = round(float(np.median(spacings[:, 0])), 3), {}
        for name, side in sides.items():
            patch = [16 if name == "paper" else 8, *[min(side, 128)] * 2]
            plane = {"plane": [side, side]} if side > 128 else {}
            changes["geometry_3d"][name] = Geometry(size=patch, spacing_mm=mm[name], slice_mm=slice_mm, **plane)
    known = slices > 1 and len({v["slice_axis"] for v in volumes}) == 1
    # a third of all pairs of slices are then nearer than the threshold
    changes |= {"positions": "known", "threshold": 0.2} if known else {"positions": "unknown"}
    return dataset.model_copy(update=changes)


def _remarks(dataset: DatasetConfig, volumes: list[dict[str, Any]], classes: list[dict[str, Any]]) -> list[str]:
    labelled = [v for v in volumes if v["labelled"]]
    protocol, found = dataset.protocols["seeded"], []
    for name, geometry in dataset.geometry.items():
        grid = " x ".join(map(str, geometry.size))
        if geometry.resize:
            found.append(f"{name}: every image is resized to {grid}")
            continue
        held_mm = geometry.size[0] * geometry.spacing_mm + 1e-3
        cropped, cut = (
            sum(v[k] > held_mm for v in some) for k, some in (("field_mm", volumes), ("needed_mm", labelled))
        )
        grid = f"{name}: resampled to {geometry.spacing_mm:g} mm, cropped or padded to {grid}"
        found.append(f"{grid}; volumes that lose a margin: {cropped}, that lose labelled voxels: {cut}")
    if dataset.positions == "known":
        found.append(
            "all slices run along one axis: positions are taken as known, as gd and pcl need; else: positions: unknown"
        )
    else:
        found.append("positions are unknown: choose gr or ufc, not gd or pcl")
    if (rest := len(labelled) - protocol.test - protocol.validation) > 0:
        sets = f"{protocol.test} to test, {protocol.validation} to validate, {rest} of which labelled ones are drawn"
        found.append(f"{len(labelled)} labelled subjects: {sets}; {len(volumes) - len(labelled)} more for pre-training")
    if "nnunet" in dataset.protocols:
        found.append("splits_final.json: its folds are a protocol, for studies with --set study.protocol=nnunet")
    found.append(
        "every volume counts as a subject: keep one of each patient, or both training and test may see the patient"
    )
    if empty := [v["file"] for v in labelled if not sum(v["voxels"])]:
        told = f"{len(empty)} masks are empty, the first of {empty[0]}: they say that nothing is there"
        found.append(f"{told}; remove those that are not drawn yet")
    for c in classes:
        if 2 * c["subjects"] < len(labelled):
            few = f"class {c['name']!r} is in {c['subjects']} of {len(labelled)} labelled subjects: draws will miss it"
            found.append(few + ", and one of the three sets must" * (c["subjects"] < 3))
    return found


def _texts(path: Path) -> bool:
    """Whether a header carries text, which may name a patient."""
    with suppress(Exception), nib.imageglobals.LoggingOutputSuppressor():
        header = nib.load(path).header
        words = [header[name].item().strip(b"\0 ") for name in HEADER_TEXTS if name in header]
        return any(words) or bool(len(getattr(header, "extensions", ())))
    return False


def _splits_problems(folder: Path, subjects: set[str]) -> list[str]:
    """What is wrong with the names in nnU-Net's `splits_final.json`, where there is one."""
    if not (path := folder / "splits_final.json").exists():
        return []
    try:
        with reading(path, "JSON"):
            found = json.loads(path.read_text(encoding="utf-8"))
        folds = TypeAdapter(Folds).validate_python(found)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        return [f"{path}: is no list of folds with `train` and `val` ({reason}); correct it"]
    except RequestError as error:
        return [str(error)]
    names = dict.fromkeys(name for fold in folds for name in (*fold.train, *fold.val))
    if not (unknown := [name for name in names if name not in subjects]):
        return []
    bare = re.sub(r"(_\d{4})?(\.nii(\.gz)?)?$", "", unknown[0])
    remedy = f"write {bare}" if bare in subjects else "remove the name, or add its files"
    return [f"{path}: names {len(unknown)} cases that are not there, the first is {unknown[0]}; {remedy}"]


def _names_a_mask(subject: str, subjects: set[str]) -> bool:
    """Whether it is another subject with a word for masks behind it: `03_seg_r2`, where `03` is there."""
    return any(subject[:n] in subjects and MASK.search(subject[n:]) for n in range(1, len(subject)))


def check(folder: Path | str, name: str = "", options: dict[str, Any] | None = None) -> Report:
    """Open every volume of a folder and report; what cannot be used is a problem, never an exception.

    options: those of the data set that it proposes, such as `{"nan": 0}`. What is wrong with several files in the same
    way is told once.
    """
    folder = Path(folder).absolute()
    name = re.sub(r"\W+", "_", name or folder.name).strip("_").lower() or "mine"
    name = f"my_{name}" if name in known_names("datasets") else name
    report = Report(str(folder), "unknown layout")
    try:
        report.layout, draft, problems = _draft(folder, name, dict(options or {}))
        refs = scan(draft)
        classes = class_names(draft, folder) if draft.adapter == "msd" else {}
    except RequestError as error:
        report.problems.append(str(error))
        return report
    draft = draft.model_copy(update={"classes": classes})
    values, wrong = _mask_values(refs, draft)
    ignored, ours = _ignored(values, classes), dict(draft.options)
    classes = classes or {value: f"class {value}" for value in sorted(values - {0, *ignored})}
    ours |= {"undeclared": "background"} if ignored else {}
    changes = {"classes": classes or {1: "class 1"}}  # images are read without classes, too
    changes |= {"options": ours} if ours else {}
    draft, seen, faults, notes = draft.model_copy(update=changes), {}, [], []
    slice_axis, subjects = usual_slice_axis(refs, draft), {ref.subject for ref in refs}
    for ref in tqdm(refs, "check", unit="volume", disable=None):
        names = [str(path) for path in ref.files] + [path.name for path in ref.files] + [ref.subject]
        if ref in wrong:
            faults.append((wrong[ref], names))
            continue
        if not ref.label and _names_a_mask(ref.subject, subjects):
            faults.append((f"{ref.source}: has the name of a mask, and would be taken for a scan; move it away", names))
            continue
        try:
            volume = read(ref, draft, slice_axis)
            normalise(volume, draft.normalisation, ref.source)
            require_new(volume, ref, seen)
        except RequestError as error:
            faults.append((str(error), names))
            continue
        report.volumes.append(_about(volume, ref, draft))
        notes += [(f"{ref.images[0].relative_to(folder)}: {note}", names) for note in volume.notes]
        if is_volume(ref.images[0]) and _texts(ref.images[0]):
            what = "its header holds text, which may name a patient; masks that clseg writes do not carry it"
            notes.append((f"{ref.images[0].relative_to(folder)}: {what}", names))
    counts = Counter(v["channels"] for v in report.volumes)
    usual = max(counts) if draft.photographs and counts else next(iter(counts.most_common(1)), (1,))[0]
    for about in [v for v in report.volumes if v["channels"] != usual]:
        if draft.photographs:  # a grey one among others in colour is read in colour
            about["channels"] = usual
            continue
        told = f"{about['file']}: has {about['channels']} channels and most have {usual} (a frame of a 4-D file is one)"
        told += "; correct or remove it, or take one of each with --set options.channel=0"
        faults.append((told, [about["file"]]))
        report.volumes.remove(about)
    lost = sorted({folder / path for path in _files(folder)} - {path for ref in refs for path in ref.files})
    places = {ref.label.parent for ref in refs if ref.label}
    orphans = [path for path in lost if path.parent in places and MASK.search(path.relative_to(folder).as_posix())]
    faults += [
        (f"{path}: is a mask of no image; give it the name of its image, or remove it", [str(path)]) for path in orphans
    ]
    problems += once(faults)
    labelled = [v for v in report.volumes if v["labelled"]]
    for number, (value, title) in enumerate(classes.items()):
        own = [v["voxels"][number] for v in labelled]
        report.classes.append({"name": title, "value": value, "voxels": sum(own), "subjects": sum(n > 0 for n in own)})
        if labelled and not sum(own):
            problems.append(f"{folder}: class {title!r} ({value}) is in no label; correct the masks or the classes")
    problems += _splits_problems(folder, subjects)
    if len(labelled) < 3 and not faults:
        wanted = "a study needs 3, one each to train, validate and test; add masks"
        problems.append(f"{folder}: {len(labelled)} labelled subjects can be used, and {wanted}")
    report.problems = problems
    if report.volumes:
        report.dataset = propose(draft, report.volumes)
        report.remarks = _remarks(report.dataset, report.volumes, report.classes)
        if draft.options.get("undeclared") == "background":
            marks = ", ".join(map(str, ignored)) or "that are not declared"
            told = f"mask values {marks} are taken to mark voxels to leave out, and made background"
            report.remarks.append(f"{told}; if one is a class, declare it in the data set file")
        if renamed := [ref.subject for ref in refs if ref.subject.endswith("-Ts")]:
            told = f"{len(renamed)} images of imagesTs have names of imagesTr: they count as other patients"
            report.remarks.append(f"{told}, the first as {renamed[0]}")
        report.remarks += once(notes)
        if others := [path for path in lost if path not in orphans]:
            report.remarks.append(
                f"{len(others)} image files are not used, for example {others[0].relative_to(folder)}"
            )
    return report


def expect(report: Report) -> list[dict[str, Any]]:
    """Disk, memory and minutes of a run of `matched-gr` with 1 labelled subject by profile, from a few steps of its
    network timed on this machine."""
    dataset, rows, wanted = report.dataset, [], read_methods()["matched-gr"].stages[0].slices
    slices = sum(v["shape"][0] for v in report.volumes)
    for name, geometry in dataset.geometry.items():
        experiment = read_profile(name)
        pretrain, finetune = experiment.pretrain, experiment.finetune
        about = experiment.network.model_dump_json(), dataset.channels, len(dataset.classes) + 1, tuple(geometry.size)
        views = 2 * min(wanted, pretrain.max_slices or wanted)
        (encoding, _), (segmenting, kept) = (pass_cost(*about, whole, experiment.threads) for whole in (False, True))
        memory = kept * finetune.batch + 16 * weights_in(*about)  # gradients, Adam's means
        row = {"profile": name, "disk_mb": slices * np.prod(geometry.size) * (2 * dataset.channels + 1) / 1e6}
        row |= {"memory_mb": memory / 1e6 + 500}  # 500: the program itself
        row |= {"pretrain_minutes": pretrain.steps * views * encoding / 60}
        row |= {"finetune_minutes": finetune.steps_for(1) * finetune.batch * segmenting / 60}
        rows.append({key: value if key == "profile" else round(float(value), 2) for key, value in row.items()})
    return rows


def write(dataset: DatasetConfig, path: Path) -> None:
    """The data set as a file that `clseg run STUDY --dataset FILE` takes; `RequestError` if it is there already."""
    wrong = {
        "is no .yaml file": path.suffix not in (".yaml", ".yml"),
        "is there already": path.exists(),
        "has the name of a data set of the project": dataset.name in known_names("datasets"),
    }
    if why := next((text for text, so in wrong.items() if so), ""):
        raise RequestError(f"{path}: {why}; choose another name")
    text = yaml.safe_dump(dataset.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
    with writing(path, "choose another place"):
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
