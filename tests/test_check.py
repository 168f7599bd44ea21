"""Folders of one's own: what the check finds in them, what it calls wrong, and that a study takes what it proposes."""

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from clseg import paths
from clseg.data.formats import read, scan
from clseg.data.prepare import prepare
from clseg.errors import RequestError
from clseg.study import archive, grid, runs
from clseg.study.files import read_dataset, read_study
from clseg.tools import cli
from clseg.tools.check import check, expect, write

AFFINE = np.diag([1.5, 1.5, 4.0, 1.0])


def volume(seed, shape=(40, 36, 10)):
    """Image and mask with axes x, y, z; class 2 is in subject 0 only."""
    mask = np.zeros(shape, np.uint8)
    mask[10:20, 12:20] = 1
    if seed == 0:
        mask[0:4, 12:20] = 2
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16), mask


def save(path, data, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)


def medical(folder, layout, subjects=8, labelled=8):
    """A folder in the layout `msd`, `nnunet` or `pairs` (images and masks side by side)."""
    cases = [f"case_{k:02d}" for k in range(subjects)]
    image_name, label_name = {
        "msd": ("imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz"),
        "nnunet": ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"),
        "pairs": ("{}.nii.gz", "{}_seg.nii.gz"),
    }[layout]
    for k, case in enumerate(cases):
        image, mask = volume(k)
        save(folder / image_name.format(case), image)
        if k < labelled:
            save(folder / label_name.format(case), mask)
    if layout == "msd":
        listed = [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases]
        about = {"labels": {"0": "background", "1": "organ", "2": "rare"}, "modality": {"0": "CT"}, "training": listed}
    else:
        about = {"labels": {"background": 0, "organ": 1, "rare": 2}, "channel_names": {"0": "CT"}}
        about["file_ending"] = ".nii.gz"
    if layout != "pairs":
        (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def photographs(folder, image_name="images/IMG_{:03d}.png", mask_name="masks/IMG_{:03d}_segmentation.png", grey=False):
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 255, (50, 70, 3)).astype(np.uint8)
        mask = np.zeros((50, 70), np.uint8)
        mask[10:30, 20:40] = 255
        for name, data in ((image_name, pixels[..., 0] if grey else pixels), (mask_name, mask)):
            path = folder / name.format(k)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data).save(path)
    return folder


@pytest.mark.parametrize("layout", ["msd", "nnunet", "pairs"])
def test_what_is_there_is_the_same_in_every_layout(layout, tmp_path):
    report = check(medical(tmp_path / "scans of mine", layout))
    assert report.problems == []
    assert len(report.volumes) == 8
    first = report.volumes[0]
    assert (first["shape"], first["orientation"]) == ([10, 36, 40], "RAS")
    assert first["spacing_mm"] == pytest.approx((4, 1.5, 1.5))
    assert [(c["value"], c["voxels"], c["subjects"]) for c in report.classes] == [(1, 8 * 800, 8), (2, 320, 1)]
    assert any(c["name"] in remark and "1 of 8" in remark for c in report.classes for remark in report.remarks)
    dataset = report.dataset
    assert (dataset.name, dataset.channels, dataset.positions) == ("scans_of_mine", 1, "known")
    # 40 x 1.5 mm are 60: 64 pixels of 1.5 mm hold them, 32 must be larger
    assert (dataset.geometry["laptop"].size, dataset.geometry["laptop"].spacing_mm) == ([64, 64], 1.5)
    assert dataset.geometry["smoke"].spacing_mm == pytest.approx(60 / 32)
    assert dataset.geometry_3d["smoke"].slice_mm == 4
    assert (dataset.protocols["seeded"].test, dataset.protocols["seeded"].validation) == (2, 1)


def test_unlabelled_volumes_are_kept_for_pre_training(tmp_path):
    report = check(medical(tmp_path / "few", "nnunet", subjects=9, labelled=5))
    assert report.problems == []
    assert sum(v["labelled"] for v in report.volumes) == 5
    assert any("5 labelled subjects: 2 to test, 1 to validate, 2" in remark for remark in report.remarks)
    assert any("4 more for pre-training" in remark for remark in report.remarks)


@pytest.mark.parametrize(
    "names",
    [
        ("images/IMG_{:03d}.png", "masks/IMG_{:03d}_segmentation.png"),
        ("img_{:03d}.png", "mask_{:03d}.png"),
        ("all/{:03d}.jpg", "all/{:03d}_mask.png"),
        ("p{:02d}/photo.png", "p{:02d}/mask.png"),
    ],
)
def test_photographs_and_masks_are_paired_by_name(names, tmp_path):
    report = check(photographs(tmp_path / "skin", *names))
    assert report.problems == []
    assert [v["labelled"] for v in report.volumes] == [True] * 6
    dataset = report.dataset
    assert (dataset.channels, dataset.positions, dataset.classes) == (3, "unknown", {255: "class 255"})
    assert all(geometry.resize for geometry in dataset.geometry.values())
    assert dataset.geometry["paper"].size == [96, 96]


def test_grey_photographs_have_one_channel(tmp_path):
    assert check(photographs(tmp_path / "grey", grey=True)).dataset.channels == 1


def test_one_grey_photograph_among_coloured_ones_is_read_in_colour(tmp_path):
    folder = photographs(tmp_path / "mixed")
    path = folder / "images/IMG_000.png"
    Image.open(path).convert("L").save(path)
    report = check(folder)
    assert (report.problems, report.dataset.channels) == ([], 3)
    assert {v["channels"] for v in report.volumes} == {3}


def test_every_problem_is_told_at_once(tmp_path, capsys):
    folder = medical(tmp_path / "scans", "nnunet")
    truncated, orphan = folder / "imagesTr/case_01_0000.nii.gz", folder / "labelsTr/nobody.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:200])
    save(folder / "imagesTr/case_02_0000.nii.gz", np.full((40, 36, 10), np.nan, np.float32))
    save(orphan, volume(1)[1])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert cli.main(["check", str(folder), "--write", str(tmp_path / "mine.yaml")]) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"clseg: {folder}") for line in lines)
    assert "6 usable" in output.out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "a check writes nothing"


def test_problems_are_in_the_json_too(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path / "scans"), "--json"]) == 2
    output = capsys.readouterr()
    assert [f"clseg: {problem}" for problem in json.loads(output.out)["problems"]] == output.err.splitlines()


def test_the_grid_holds_labels_that_reach_beyond_the_median_volume(tmp_path):
    folder = tmp_path / "scans"
    medical(folder, "pairs")
    for k in range(3):  # of eight: their labels reach 60 pixels of 1.5 mm to each side, the median volume has 40
        image, mask = volume(k, (120, 36, 10))
        mask[0] = 1
        save(folder / f"case_{k:02d}.nii.gz", image)
        save(folder / f"case_{k:02d}_seg.nii.gz", mask)
    geometry = check(folder).dataset.geometry
    assert (geometry["paper"].size, geometry["paper"].spacing_mm) == ([128, 128], 1.5)
    assert geometry["laptop"].spacing_mm == pytest.approx(180 / 64, abs=1e-3)


def test_a_second_mask_is_no_scan(tmp_path):
    """Patterns of images fit it, too, and of masks none does: it would be pre-trained on, as a patient of its own."""
    folder, options = medical(tmp_path / "scans", "pairs"), {"images": "case_{subject}.nii.gz"}
    options["labels"] = "case_{subject}_seg.nii.gz"
    assert check(folder, options=options).problems == []
    save(folder / "case_GT_006.nii.gz", volume(60)[0])  # a scan by its own right
    save(folder / "case_03_seg_r2.nii.gz", volume(3)[1])
    report = check(folder, options=options)
    assert report.problems == [
        f"{folder / 'case_03_seg_r2.nii.gz'}: has the name of a mask, and would be taken for a scan; move it away"
    ]
    assert len(report.volumes) == 9


def test_json_holds_everything(tmp_path, capsys):
    folder = medical(tmp_path / "scans", "msd")
    assert cli.main(["check", str(folder), "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    report = json.loads(output.out)
    assert [v["subject"] for v in report["volumes"]] == [f"case_{k:02d}" for k in range(8)]
    assert report["dataset"]["folder"] == str(folder)
    assert [row["profile"] for row in report["expect"]] == ["smoke", "laptop", "paper"]
    assert all(row["disk_mb"] > 0 and row["memory_mb"] > 500 for row in report["expect"])


def test_disk_and_memory_grow_as_they_must(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    report = check(medical(tmp_path / "scans", "msd"))
    smoke, laptop, paper = expect(report)
    assert torch.get_num_threads() == 1, "what was timed with the four of `paper` is left as it was"
    store = prepare(report.dataset, report.dataset.geometry["laptop"], progress=False)
    files = [store.folder / "images.f16", store.folder / "labels.u8"]
    assert laptop["disk_mb"] == pytest.approx(sum(file.stat().st_size for file in files) / 1e6, abs=0.01)
    assert smoke["memory_mb"] < laptop["memory_mb"] < paper["memory_mb"]
    assert laptop["pretrain_minutes"] < paper["pretrain_minutes"]


def test_a_study_takes_what_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    folder = medical(tmp_path / "scans", "nnunet", labelled=5)
    assert cli.main(["check", str(folder), "--write", "My scans.yaml"]) == 0
    dataset = read_dataset("My scans.yaml")
    assert dataset == check(folder, "my_scans").dataset
    assert len(scan(dataset)) == 8
    capsys.readouterr()
    words = ["run", "quickstart", "--dataset", "My scans.yaml", "--set", "study.labelled=[1,2]"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "finetune-gd+lr-labelled2" in capsys.readouterr().out


def test_folds_of_nnunet_are_a_protocol_of_the_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    folder, cases = medical(tmp_path / "scans", "nnunet"), [f"case_{k:02d}" for k in range(8)]
    folds = [{"train": cases[k:] + cases[: k - 4], "val": cases[k - 4 : k]} for k in (4, 8)]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    assert cli.main(["check", str(folder), "--write", "mine.yaml"]) == 0
    assert "study.protocol=nnunet" in capsys.readouterr().out
    words = ["run", "quickstart", "--dataset", "mine.yaml", "--set", "study.labelled=[2]", "--dry-run"]
    names = []
    for protocol in ("seeded", "nnunet"):
        assert cli.main([*words, "--set", f"study.protocol={protocol}"]) == 0
        names.append([line.split()[-1] for line in capsys.readouterr().out.splitlines() if "pretrain-" in line])
    assert [("-draw1-" in name) for name in names[0] + names[1]] == [False] * 2 + [True] * 2  # a fold has its own
    study = read_study("quickstart").model_copy(update={"protocol": "nnunet", "labelled": [2], "draws": [1, 2]})
    for run in grid.expand(study, "mine.yaml", "smoke").all:
        split = runs.split_of(run, prepare(run.experiment.dataset, run.experiment.geometry, progress=False))
        assert list(split.test) == folds[run.parameters.draw - 1]["val"]
        assert not {*split.test} & {*split.pretrain, *split.labelled, *split.validation}


def test_a_data_set_file_is_not_overwritten_and_takes_no_known_name(tmp_path):
    dataset = check(medical(tmp_path / "scans", "msd")).dataset
    path = tmp_path / "mine.yaml"
    write(dataset, path)
    kept = path.read_bytes()
    for wrong, name, why in (
        (path, "mine", "is there already"),
        (tmp_path / "acdc.yaml", "acdc", "has the name of a data set of the project"),
        (tmp_path / "mine.txt", "mine", "is no .yaml file"),
    ):
        with pytest.raises(RequestError, match=f"{wrong.name}: {why}"):
            write(dataset.model_copy(update={"name": name}), wrong)
    assert path.read_bytes() == kept
    assert sorted(file.name for file in tmp_path.glob("*.*")) == ["mine.yaml"]


def few(folder, change=lambda mask: mask, image="images/{}.nii.gz", label="masks/{}.nii.gz", affine=AFFINE):
    """Four labelled volumes and one without a mask, in a layout and with changed masks."""
    for k in range(5):
        array, mask = volume(k, (20, 24, 4))
        mask[0:4, 12:20] = 2
        save(folder / image.format(f"p{k}"), array)
        if k < 4:
            save(folder / label.format(f"p{k}"), change(mask), affine)
    return folder


def pictures(folder, mask=lambda path, m: Image.fromarray(255 * m).save(path), image=None, end="png", mask_end="png"):
    """Four pictures with a disc, and one without a mask."""
    y, x = np.mgrid[:40, :48]
    for k in range(5):
        disc = (np.hypot(y - 18, x - 20 - k) < 9).astype(np.uint8)
        noise = np.random.default_rng(k).integers(0, 60, (40, 48, 3))
        pixels = (150 - 80 * disc[..., None] + noise).astype(np.uint8)
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        path = folder / "images" / f"p{k}.{end}"
        image(path, pixels) if image else Image.fromarray(pixels).save(path)
        if k < 4:
            mask(folder / "masks" / f"p{k}.{mask_end}", disc)
    return folder


def classes_of(report):
    return [c["value"] for c in report.classes]


ROUNDED = "values of the mask are off by 2e-05 and were rounded (4 such files, this is the first)"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda mask: (mask * 0.99999).astype(np.float32), ROUNDED),
        (lambda mask: mask.astype(np.uint16), ""),
        (
            lambda mask: np.where(mask == 2, -1, mask.astype(np.int16)),
            "mask values -1 are taken to mark voxels to leave",
        ),
        (lambda mask: np.where(mask == 2, 255, mask), "mask values 255 are taken to mark voxels to leave out"),
    ],
)
def test_masks_that_are_not_quite_plain_are_read_and_that_is_told_once(change, told, tmp_path):
    report = check(few(tmp_path / "scans", change))
    assert report.problems == []
    leaves = "leave" in told
    assert classes_of(report) == ([1] if leaves else [1, 2])
    assert report.classes[0]["voxels"] == 4 * 320
    assert sum(told in remark for remark in report.remarks) == (1 if told else len(report.remarks))
    assert report.dataset.options.get("undeclared") == ("background" if leaves else None)
    write(report.dataset, tmp_path / "mine.yaml")
    mine = read_dataset(str(tmp_path / "mine.yaml"))
    assert prepare(mine, mine.geometry["smoke"], progress=False).num_classes == (2 if leaves else 3)


def test_a_scaled_mask_is_read(tmp_path):
    folder = few(tmp_path / "scans")
    for path in (folder / "masks").iterdir():
        image = nib.Nifti1Image(np.asarray(nib.load(path).dataobj).astype(np.int16) * 1000, AFFINE)
        image.header.set_slope_inter(0.001, 0)
        nib.save(image, path)
    report = check(folder)
    assert (report.problems, classes_of(report)) == ([], [1, 2])


SOFT = "masks/p0.nii.gz: the mask is soft or was resampled: it holds values 0.37 to 0.74; "
SOFT += "resample it with nearest neighbours, or set options.threshold, for a probability 0.5 (4 such files"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda mask: (mask * 0.37).astype(np.float32), SOFT),
        (
            lambda mask: (mask * 1.5).astype(np.float32),
            "it holds values 1.5; resample it with nearest neighbours (4 such",
        ),
        (lambda mask: np.where(mask == 0, np.nan, mask).astype(np.float32), "holds NaN in 1472 voxels"),
        (lambda mask: np.arange(mask.size, dtype=np.int16).reshape(mask.shape), "the mask holds 1920 values"),
    ],
)
def test_what_is_wrong_with_all_masks_is_told_once(change, words, tmp_path, capsys):
    folder = few(tmp_path / "scans", change)
    assert cli.main(["check", str(folder)]) == 2
    output = capsys.readouterr()
    (line,) = [line for line in output.err.splitlines() if "|" not in line]
    assert words in line
    assert "(4 such files, this is the first)" in line
    assert line.startswith(f"clseg: {folder}/masks/p0.nii.gz: ")
    assert "-" not in "".join(remark for remark in output.out.splitlines() if "subjects:" in remark)


def test_a_threshold_does_not_merge_classes(tmp_path):
    report = check(few(tmp_path / "scans"), options={"threshold": 0.5})
    assert "p0.nii.gz: holds classes 0 to 2, and options.threshold merges them; remove it" in report.problems[0]


def test_soft_masks_are_read_with_a_threshold(tmp_path, capsys):
    folder = few(tmp_path / "scans", lambda mask: (mask * 0.37).astype(np.float32))
    words = ["check", str(folder), "--set", "options.threshold=0.5", "--write", str(tmp_path / "mine.yaml")]
    assert cli.main(words) == 0
    mine = read_dataset(str(tmp_path / "mine.yaml"))
    assert (mine.options["threshold"], mine.classes) == (0.5, {1: "class 1"})
    with pytest.raises(RequestError, match="--set nan=0: of a check only options can be set"):
        cli.COMMANDS["check"][0](cli.parser().parse_args(["check", str(folder), "--set", "nan=0"]))


def test_nan_outside_of_the_body_may_be_given_a_value(tmp_path):
    folder = few(tmp_path / "scans")
    for path in (folder / "images").iterdir():
        data = nib.load(path).get_fdata().astype(np.float32)
        data[:2] = np.nan
        save(path, data)
    (problem,) = check(folder).problems
    assert (
        "p0.nii.gz: holds 192 intensities that are NaN or infinite; repair or remove the volume, or give options.nan"
        in (problem)
    )
    assert problem.endswith("such as 0 (5 such files, this is the first)")
    report = check(folder, options={"nan": 0})
    assert (report.problems, report.dataset.options["nan"]) == ([], 0)


@pytest.mark.parametrize("lost", [False, True])
def test_masks_on_another_grid_take_the_header_of_the_image_if_one_says_so(lost, tmp_path):
    folder = few(tmp_path / "scans", affine=np.eye(4) if lost else np.diag([-1.0, -1, 1, 1]) @ AFFINE)
    (problem,) = check(folder).problems
    expected = "its header was lost" if lost else "its affine mirrors x and y"
    assert f"masks/p0.nii.gz: the grid is not that of p0.nii.gz: it has the right shape, but {expected}" in problem
    assert ", ".join(["set options.label_header to image", "which takes the header of the image"]) in problem
    assert "(4 such files, this is the first)" in problem
    assert ("resample" in problem) != lost
    assert check(folder, options={"label_header": "image"}).problems == []


@pytest.mark.parametrize(
    ("colours", "found"),
    [
        ([(0, 0, 0), (128, 0, 0), (0, 128, 0)], [1, 2]),
        ([(0, 0, 0), (255, 0, 0), (0, 130, 0)], [1, 2]),  # of one brightness
        ([(0, 0, 0)] * 3, [1, 2]),
    ],
)
def test_classes_of_a_palette_are_its_indices(colours, found, tmp_path):
    def mask(path, disc):
        disc[:5, :5] = 2
        picture = Image.fromarray(disc)
        picture.putpalette([value for colour in colours for value in colour])
        picture.save(path)

    report = check(pictures(tmp_path / "skin", mask))
    assert (report.problems, classes_of(report)) == ([], found)
    assert report.classes[1]["voxels"] == 4 * 25


def test_colours_that_are_numbered_by_their_frequency_are_no_classes(tmp_path):
    def black_is_1(path, disc):
        picture = Image.fromarray(1 - disc)
        picture.putpalette([*colour, 0, 0, 0])
        picture.save(path)

    colour = [255, 0, 0]
    (problem,) = check(pictures(tmp_path / "skin", black_is_1)).problems
    assert "class 0 of its palette is a colour and 1 is black" in problem
    colour = [255, 255, 255]  # black on white
    assert check(pictures(tmp_path / "white", black_is_1)).problems == []


def blurred(path, disc):
    Image.fromarray(255 * disc).resize((24, 20), Image.BILINEAR).resize((48, 40), Image.BILINEAR).save(path)


def transparent(path, disc):
    pixels = np.full((*disc.shape, 4), 255, np.uint8)
    pixels[..., 3] = 255 * disc
    Image.fromarray(pixels).save(path)


def coloured(path, disc):
    Image.fromarray(disc[..., None] * np.array([255, 0, 0], np.uint8)).save(path)


@pytest.mark.parametrize(
    ("mask", "ending", "values", "words"),
    [
        (lambda path, disc: Image.fromarray(disc.astype(np.uint16)).save(path), "png", [1], ""),
        (lambda path, disc: Image.fromarray(disc.astype(bool)).save(path), "png", [255], ""),
        (lambda path, disc: Image.fromarray(255 * disc).convert("RGB").save(path), "png", [255], ""),
        (transparent, "png", [255], ""),
        (coloured, "png", [], "the mask is in colour; save classes as grey values (4 such files"),
        (blurred, "png", [], "the mask is blurred or interpolated: it holds"),
        (blurred, "jpg", [], "the mask is JPEG, which is lossy: it holds"),
    ],
)
def test_masks_of_pictures(mask, ending, values, words, tmp_path):
    report = check(pictures(tmp_path / "skin", mask, mask_end=ending))
    assert classes_of(report) == values
    if not words:
        assert report.problems == []
        assert report.classes[0]["voxels"] == 4 * 249
        return
    (problem,) = report.problems
    assert words in problem
    assert "masks/p0" in problem
    assert "(4 such files, this is the first)" in problem


def test_blurred_masks_are_read_with_a_threshold(tmp_path):
    report = check(pictures(tmp_path / "skin", blurred, mask_end="jpg"), options={"threshold": 128})
    assert (report.problems, classes_of(report)) == ([], [1])
    assert report.classes[0]["voxels"] == pytest.approx(4 * 249, rel=0.1)


def test_a_deep_picture_has_one_channel(tmp_path):
    def deep(path, pixels):
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(path)

    report = check(pictures(tmp_path / "skin", image=deep))
    assert (report.problems, report.dataset.channels) == ([], 1)
    assert report.volumes[0]["high"] > 255


@pytest.mark.parametrize(
    ("orientation", "back"), [(6, Image.ROTATE_90), (3, Image.ROTATE_180), (2, Image.FLIP_LEFT_RIGHT)]
)
def test_a_picture_that_its_camera_turned_is_read_upright_as_its_mask_lies(orientation, back, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation

    def turned(path, pixels):
        Image.fromarray(pixels).transpose(back).save(path, exif=exif, quality=95)

    folder = pictures(tmp_path / "skin", image=turned, end="jpg")
    report = check(folder)
    assert report.problems == []
    told = "is turned upright, as its camera's orientation (EXIF) says; its mask must lie so, too (5 such files"
    assert sum(told in remark for remark in report.remarks) == 1
    (ref, *_) = scan(report.dataset)
    read_back = read(ref, report.dataset)
    assert read_back.image[:, read_back.label > 0].mean() < read_back.image[:, read_back.label == 0].mean() - 50


def test_a_stack_of_pages_is_no_picture(tmp_path):
    def stack(path, array):
        first = Image.fromarray(array)
        first.save(path, save_all=True, append_images=[first.rotate(180)])

    for part in ("image", "mask"):
        folder = pictures(tmp_path / part, **{part: stack}, **{"end" if part == "image" else "mask_end": "tif"})
        (problem,) = check(folder).problems
        assert f"/{part}s/p0.tif: holds 2 pages and one picture is needed" in problem


def renamed(folder, *names):
    for old, new in names:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)
    return folder


def unzipped(folder, *names):
    for name in names:
        path = folder / name
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    return folder


LINKED = {"per subject": ("{0}/{0}_t1.nii.gz", "{0}/{0}_seg.nii.gz")}
LINKED["BIDS"] = ("sub-{0}/anat/sub-{0}_T1w.nii.gz", "derivatives/labels/sub-{0}/anat/sub-{0}_T1w_seg.nii.gz")
LINKED["brackets"] = ("images [v1]/{0}.nii.gz", "masks [v1]/{0}.nii.gz")
LINKED["mgz"] = ("images/{0}.mgz", "masks/{0}.nii.gz")


@pytest.mark.parametrize("layout", LINKED)
def test_layouts_are_read_as_people_have_them(layout, tmp_path):
    image, label = LINKED[layout]
    report = check(few(tmp_path / "scans", image=image, label=label))
    assert report.problems == []
    assert (len(report.volumes), sum(v["labelled"] for v in report.volumes)) == (5, 4)
    assert classes_of(report) == [1, 2]
    assert "image files are not used" not in str(report.remarks)


def test_pairs_of_header_and_voxels_are_read(tmp_path):
    folder = few(tmp_path / "scans")
    for path in [*(folder / "images").iterdir(), *(folder / "masks").iterdir()]:
        image = nib.load(path)
        nib.save(nib.Nifti1Pair(np.asarray(image.dataobj), image.affine), path.with_name(f"{path.name[:2]}.hdr"))
        path.unlink()
    report = check(folder)
    assert (report.problems, len(report.volumes), classes_of(report)) == ([], 5, [1, 2])
    assert "not used" not in str(report.remarks)
    assert len(scan(report.dataset)[0].files) == 4


def test_compressed_files_belong_to_uncompressed_ones_and_endings_may_be_large(tmp_path):
    folder = unzipped(few(tmp_path / "scans"), "images/p0.nii.gz", "images/p1.nii.gz", "masks/p2.nii.gz")
    renamed(folder, ("images/p3.nii.gz", "images/p3.NII.GZ"))
    (folder / "images/p4.nii.gz").write_bytes((folder / "images/p4.nii.gz").read_bytes() + b"\0left by a disk")
    report = check(folder)
    assert (report.problems, len(report.volumes), sum(v["labelled"] for v in report.volumes)) == ([], 5, 4)
    folder = renamed(pictures(tmp_path / "skin"), ("images/p0.png", "images/p0.PNG"), ("masks/p1.png", "masks/p1.Png"))
    Image.open(folder / "images/p2.png").save(folder / "images/p2.jpeg")
    (folder / "images/p2.png").unlink()
    report = check(folder)
    assert (report.problems, len(report.volumes), sum(v["labelled"] for v in report.volumes)) == ([], 5, 4)


def test_a_stray_file_an_old_folder_and_a_linked_one_change_nothing(tmp_path):
    folder = few(tmp_path / "scans")
    save(folder / "atlas.nii.gz", volume(55)[0])
    (folder / "masks").rename(tmp_path / "elsewhere")
    (folder / "masks").symlink_to(tmp_path / "elsewhere")
    report = check(folder)
    assert (report.problems, len(report.volumes), sum(v["labelled"] for v in report.volumes)) == ([], 5, 4)
    assert report.remarks[-1] == "1 image files are not used, for example atlas.nii.gz"


def test_a_folder_in_parts_is_told_and_what_to_do(tmp_path):
    folder = few(tmp_path / "scans", image="train/images/{}.nii.gz", label="train/masks/{}.nii.gz")
    few(folder, image="val/images/v{}.nii.gz", label="val/masks/v{}.nii.gz")
    (problem,) = check(folder).problems
    assert "images and masks are in train/images and in val/images, and only those of train/images are read" in problem
    assert "put all into one folder, or check each part" in problem


def test_names_that_do_not_agree_are_shown_and_how_to_say_which_belong_together(tmp_path):
    folder = few(tmp_path / "scans", label="masks/of_p{}_x.nii.gz", image="images/{}.nii.gz")
    for path in (folder / "images").iterdir():
        path.rename(path.with_name(f"{int(path.name[1]):03d}.nii.gz"))
    (problem,) = check(folder).problems
    assert "5 in images (such as images/000.nii.gz), 4 in masks (such as masks/of_pp0_x.nii.gz)" in problem
    assert "--set options.images=TEXT --set options.labels=TEXT" in problem


def test_nnunet_folders_of_every_age_are_read(tmp_path):
    first = medical(tmp_path / "v1", "msd", subjects=4, labelled=4)
    for path in (first / "imagesTr").iterdir():  # the list leaves the channel's number out
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    second = medical(tmp_path / "windows", "msd", subjects=4, labelled=4)
    info = json.loads((second / "dataset.json").read_text())
    info["training"] = [
        {key: name.removeprefix("./").replace("/", "\\") for key, name in one.items()} for one in info["training"]
    ]
    (second / "dataset.json").write_text(json.dumps(info))
    third = medical(tmp_path / "suffix", "nnunet", subjects=4, labelled=4)
    for path in (third / "labelsTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    for folder in (first, second, third):
        report = check(folder)
        assert (report.problems, sum(v["labelled"] for v in report.volumes)) == ([], 4)


def test_regions_of_nnunet_are_answered_with_plain_classes_to_copy(tmp_path):
    folder = medical(tmp_path / "scans", "nnunet", subjects=4, labelled=4)
    info = json.loads((folder / "dataset.json").read_text())
    info |= {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps(info))
    (problem,) = check(folder).problems
    assert problem.endswith('declare plain ones instead: "labels": {"background": 0, "class 1": 1, "core": 2}')
    (folder / "dataset.json").write_text(json.dumps(info | {"labels": {"background": 0, "class 1": 1, "core": 2}}))
    assert check(folder).problems == []


def test_an_ignore_label_of_nnunet_becomes_background_and_that_is_told(tmp_path):
    folder = medical(tmp_path / "scans", "nnunet", subjects=4, labelled=4)
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | {"labels": {"background": 0, "organ": 1, "ignore": 2}}))
    report = check(folder)
    assert (report.problems, classes_of(report)) == ([], [1])
    assert sum("are taken to mark voxels to leave out, and made background" in remark for remark in report.remarks) == 1


def test_patients_for_testing_may_be_numbered_anew(tmp_path):
    folder = medical(tmp_path / "scans", "nnunet", subjects=4, labelled=4)
    save(folder / "imagesTs/case_00_0000.nii.gz", volume(77)[0])
    report = check(folder)
    assert report.problems == []
    assert {v["subject"] for v in report.volumes} >= {"case_00", "case_00-Ts"}
    assert sum("1 images of imagesTs have names of imagesTr" in remark for remark in report.remarks) == 1
    shutil.copyfile(folder / "imagesTr/case_00_0000.nii.gz", folder / "imagesTs/case_00_0000.nii.gz")
    (problem,) = check(folder).problems
    assert "is the same image as" in problem


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("case_00_0000", "write case_00"), ("case_00.nii.gz", "write case_00"), ("case_77", "remove the name, or add")],
)
def test_folds_that_name_no_case_are_found(name, remedy, tmp_path):
    folder = medical(tmp_path / "scans", "nnunet", subjects=4, labelled=4)
    folds = [{"train": [name, "case_01"], "val": ["case_02", "case_03"]}]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    (problem,) = check(folder).problems
    assert f"splits_final.json: names 1 cases that are not there, the first is {name}; {remedy}" in problem


def test_a_subject_twice_in_a_fold_is_found(tmp_path):
    folder = medical(tmp_path / "scans", "nnunet")
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_01", "case_01"], "val": ["case_02"]}]))
    [problem] = check(folder).problems
    told = "splits_final.json: is no list of folds with `train` and `val` (train: names case_01 twice); correct it"
    assert problem.endswith(told)


def test_text_in_headers_is_told_but_not_shown(tmp_path):
    folder = few(tmp_path / "scans")
    for path in sorted((folder / "images").iterdir())[:2]:
        image = nib.load(path)
        image.header["descrip"] = b"Jane Doe"
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path)
    report = check(folder)
    assert report.problems == []
    (told,) = [remark for remark in report.remarks if "patient;" in remark]
    assert told.startswith("images/p0.nii.gz: its header holds text, which may name a patient")
    assert told.endswith("(2 such files, this is the first)")
    assert "Jane" not in report.text()


def test_empty_masks_are_told(tmp_path):
    """They say that a subject is healthy; of one that nobody has drawn yet that is wrong."""
    folder = medical(tmp_path / "scans", "nnunet", labelled=4)
    for case in ("case_05", "case_06"):
        save(folder / f"labelsTr/{case}.nii.gz", np.zeros((40, 36, 10), np.uint8))
    (told,) = [remark for remark in check(folder).remarks if "empty" in remark]
    assert told.startswith("2 masks are empty, the first of ")
    assert "case_05" in told
    assert not any("empty" in remark for remark in check(medical(tmp_path / "full", "nnunet")).remarks)


def test_images_of_nnunet_without_the_number_of_their_channel_are_named(tmp_path):
    folder = medical(tmp_path / "scans", "nnunet", labelled=4)
    for name in ("case_02", "case_03"):
        (folder / f"imagesTr/{name}_0000.nii.gz").rename(folder / f"imagesTr/{name}.nii.gz")
    (problem,) = check(folder).problems
    assert "case_02.nii.gz: nnU-Net names it case_02_0000.nii.gz, with the number of its channel; rename it" in problem


@pytest.mark.parametrize(
    ("layout", "labelled", "methods"),
    [
        ("nnunet", 3, ""),  # those of the study: random, weak_to_strong, matched-gd+weak_to_strong
        ("flat", 3, "random,weak_to_strong,matched-gr+weak_to_strong"),
        ("nnunet", 8, "random,matched-gd"),  # no unlabelled volumes
    ],
)
def test_the_study_that_is_proposed_has_the_methods_that_the_readme_recommends(layout, labelled, methods, tmp_path):
    folder = medical(tmp_path / "scans", "nnunet", labelled=labelled, subjects=4 if labelled == 8 else 8)
    if layout == "flat":
        for path in folder.glob("*Tr/*.nii.gz"):
            save(path, np.asarray(nib.load(path).dataobj)[..., :2])  # two slices: no partitions
    report = check(folder, "mine")
    words = shlex.split(report.study("mine.yaml"))
    assert [word for word in words if word.startswith("study.methods")] == [f"study.methods=[{methods}]"] * bool(
        methods
    )
    assert read_study("own_data").methods == ["random", "weak_to_strong", "matched-gd+weak_to_strong"]
    masks = sum(v["labelled"] for v in report.volumes)
    best = "matched-gd" if labelled == 8 else methods.rpartition(",")[2] or "matched-gd+weak_to_strong"
    changes = ["protocol=all_masks", f"methods=[{best}]", f"labelled=[{masks}]"]
    assert shlex.split(report.last("my file.yaml"))[4] == "my file.yaml"
    assert shlex.split(report.last("mine.yaml"))[8::2] == [f"study.{change}" for change in changes]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labelled", "numbers", "draws"), [(3, "[1]", "[1]"), (5, "[1,2]", "[1,2]"), (30, "[1,2,4,8,16]", "[1,2,3]")]
)
def test_the_study_that_is_proposed_fits_the_labels_that_are_there(tmp_path, labelled, numbers, draws):
    report = check(medical(tmp_path / "scans", "nnunet", labelled=labelled, subjects=labelled + 2), "mine")
    words = shlex.split(report.study("mine.yaml"))
    assert words[:4] == ["clseg", "run", "own_data", "--dataset"]
    assert [f"study.labelled={numbers}", f"study.draws={draws}"] == words[-3::2]


def test_from_a_folder_with_three_labels_to_masks_by_the_commands_that_are_printed(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    medical(tmp_path / "scans", "nnunet", labelled=3)
    status, output, _ = command(tmp_path / "out", "check", "scans", "--write", "mine.yaml")
    assert status == 0
    lines = [line for line in output.splitlines() if line.startswith(("next: clseg run ", "last, all masks and no"))]
    first, last = (shlex.split(line.replace("laptop", "smoke").partition("clseg ")[2]) for line in lines)
    status, output, errors = command(tmp_path / "out", *first, "--jobs", "1")
    assert status == 0, errors
    assert "\ncost: about " in output
    assert "\ntables and figures: " in output
    _segmented(output, tmp_path, command, "masks")
    status, output, errors = command(tmp_path / "out", *last, "--jobs", "1")
    assert status == 0, errors
    assert "\nno tables and figures: nobody was tested" in output
    run = _segmented(output, tmp_path, command, "masks of all")
    subjects = json.loads((run / "subjects.json").read_bytes())
    assert (len(subjects["labelled"]), subjects["validation"], subjects["test"]) == (3, [], [])
    assert sorted(subjects["pretrain"]) == sorted(
        path.name.removesuffix("_0000.nii.gz") for path in (tmp_path / "scans/imagesTr").iterdir()
    )
    assert (run / "metrics.csv").read_text().count("\n") == 1
    assert command(tmp_path / "out", "table", str(run))[0] == 2  # no score to show
    status, _, errors = command(tmp_path / "out", *last, "--extend")
    assert (status, "tests nobody" in errors) == (2, True)


def _segmented(output, folder, command, target):
    """The folder of the run that the printed command names, after all scans were segmented by it."""
    (line,) = (line for line in output.splitlines() if line.startswith("masks of new scans: clseg predict "))
    words = shlex.split(line.replace("SCANS", "scans/imagesTr").replace("MASKS", shlex.quote(target)))[6:]
    assert command(folder / "out", "predict", *words)[0] == 0
    assert {path.name for path in (folder / target).glob("*.nii.gz")} == {
        path.name.replace("_0000", "") for path in (folder / "scans/imagesTr").iterdir()
    }
    place = Path(words[1])
    return next(place.parent.glob(f"{place.name}-*"))


def test_draws_that_label_the_same_subjects_count_once(tmp_path, monkeypatch, command):
    """Of 5 labelled ones 2 test and 1 validates; of the 2 that are left there are two sets of one, and one of two."""
    monkeypatch.chdir(tmp_path)
    write(check(medical(tmp_path / "scans", "nnunet", labelled=5), "mine").dataset, tmp_path / "mine.yaml")
    words = ["run", "quickstart", "--dataset=mine.yaml", "--dry-run", "--set=study.methods=[random]"]
    words += ["--set=study.labelled=[1,2]", "--set=study.draws=[1,2,3,4,5,6]", "--set=study.seeds=[0,1]"]
    status, output, _ = command(tmp_path / "out", *words)
    assert status == 0
    assert "0 pre-trainings, 6 fine-tunings" in output  # two and one draws, two seeds
    told = [line for line in output.splitlines() if line.startswith("left out: ")]
    assert sorted(line.split(":")[1] for line in told)[-5:] == [f" 2 labelled, draw {n}" for n in (2, 3, 4, 5, 6)]
    assert len(told) == 9
    assert all(re.search(r": the same subjects as draw \d$", line) for line in told)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("folder", "volumes", "classes", "positions"),
    [("Task04_Hippocampus", 260, ["Anterior", "Posterior"], "known"), ("ph2", 200, ["class 255"], "unknown")],
)
def test_real_folders_are_in_order(folder, volumes, classes, positions, data_root):
    report = check(data_root / folder)
    assert report.problems == []
    assert len(report.volumes) == volumes
    assert [c["name"] for c in report.classes] == classes
    assert report.dataset.positions == positions
    assert report.dataset.geometry["laptop"].size == [64, 64]


def nnunet_copy(source, target):
    """Forty subjects of the hippocampus in nnU-Net v2 layout, five of them with a label."""
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True)
    for k, image in enumerate(sorted(source.glob("imagesTr/hippocampus_*.nii.gz"))[:40]):
        case = image.name.removesuffix(".nii.gz")
        shutil.copyfile(image, target / "imagesTr" / f"{case}_0000.nii.gz")
        if k < 5:
            shutil.copyfile(source / "labelsTr" / image.name, target / "labelsTr" / image.name)
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2}}
    (target / "dataset.json").write_text(json.dumps(about | {"file_ending": ".nii.gz", "numTraining": 5}))
    return target


@pytest.mark.real_data
def test_hippocampus_in_nnunet_layout_with_five_labels(data_root, tmp_path):
    report = check(nnunet_copy(data_root / "Task04_Hippocampus", tmp_path / "Dataset004"))
    assert report.problems == []
    assert (len(report.volumes), sum(v["labelled"] for v in report.volumes)) == (40, 5)
    assert report.dataset.geometry["paper"].spacing_mm == 1.0


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Task04_Hippocampus", "ph2", "nnunet"])
def test_the_notebook_for_own_data_then_predict_and_export(kind, data_root, tmp_path, monkeypatch):
    """From a folder to weights, masks of its own grid and weights for other programs."""
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    folder = data_root / kind
    if kind == "nnunet":
        folder = nnunet_copy(data_root / "Task04_Hippocampus", tmp_path / "Dataset004")
    parameters = {"folder": str(folder), "labelled": 1}
    grid.execute_notebook(paths.NOTEBOOKS / "03_your_data.ipynb", tmp_path / "done.ipynb", parameters)
    (weights,) = paths.runs_root().glob("*/smoke/finetune-g*/weights.safetensors")
    images = sorted(path for path in folder.rglob("imagesTr/*.nii.gz") if not path.name.startswith("."))[-3:]
    images = images or sorted((folder / "images").iterdir())[:3]
    output = tmp_path / "new"
    for image in images:
        assert cli.main(["predict", "--weights", str(weights), "--input", str(image), "--output", str(output)]) == 0
    made = [path for path in output.iterdir() if path.suffix != ".json"]
    assert len(made) == len(images)
    if kind != "ph2":
        case = nib.load(next(path for path in made if path.name.startswith(images[0].name.partition(".")[0][:15])))
        assert np.array_equal(case.affine, nib.load(images[0]).affine)
        assert set(np.unique(case.dataobj)) <= {0, 1, 2}
    copy = tmp_path / "copy.safetensors"
    assert cli.main(["export", "--weights", str(weights), "--format", "safetensors", "--output", str(copy)]) == 0
    assert archive.adaptation(copy)["classes"] == archive.adaptation(weights)["classes"]
