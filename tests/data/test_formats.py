"""Adapters: each published layout read exactly, orientation, and one clear sentence for whatever cannot be used."""

import itertools
import json
import re

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from clseg.data.formats import class_indices, class_names, read, scan
from clseg.data.prepare import prepare
from clseg.errors import RequestError
from clseg.settings import Geometry
from clseg.study.files import known_names, read_dataset

# ---------------------------------------------------------------------------------------------------------------- ACDC

CLASSES = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
SPACING = np.diag([1.5, 1.25, 10, 1])


@pytest.fixture
def acdc(roots, describe):
    return describe(adapter="acdc", folder="acdc", classes=CLASSES)


@pytest.fixture
def patient(roots, write_nifti, xyz):
    """Write one patient of the official release, image and label of its ED frame returned as [Z, Y, X]."""

    def write(part, name, ed, es, labelled=True):
        folder = roots / "acdc" / part / name
        for seed, frame in enumerate((ed, es)):
            image, label = xyz(seed)
            write_nifti(folder / f"{name}_frame{frame:02d}.nii.gz", image, SPACING)
            if labelled:
                write_nifti(folder / f"{name}_frame{frame:02d}_gt.nii.gz", label, SPACING)
        write_nifti(folder / f"{name}_4d.nii.gz", np.zeros((4, 4, 2, 3), np.float32), SPACING)
        (folder / "Info.cfg").write_text(f"ED: {ed}\nES: {es}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0")
        return folder

    return write


def test_acdc_official_release(acdc, patient, xyz):
    patient("training", "patient001", 1, 12)
    patient("training", "patient090", 4, 11)
    patient("testing", "patient101", 1, 14, labelled=False)
    refs = scan(acdc)
    assert [(ref.subject, ref.phase) for ref in refs] == list(
        itertools.product(["patient001", "patient090", "patient101"], ["ED", "ES"])
    )
    assert refs[2].images[0].name == "patient090_frame04.nii.gz"
    volume = read(refs[0], acdc)
    image, label = xyz(0)
    np.testing.assert_array_equal(volume.image, image.T[None])
    np.testing.assert_array_equal(volume.label, label.T)
    assert volume.image.dtype == np.float32
    assert volume.label.dtype == np.uint8
    assert volume.spacing_mm == (10, 1.25, 1.5)
    assert volume.flips == (False, False, False)
    assert read(refs[4], acdc).label is None
    assert {ref.phase for ref in scan(acdc.model_copy(update={"phases": ["ES"]}))} == {"ES"}


@pytest.mark.parametrize("part", ["", "training", "database/training"])
def test_acdc_official_release_in_every_folder_it_is_unpacked_to(acdc, patient, part):
    patient(part, "patient001", 1, 12)
    assert len(scan(acdc)) == 2


def test_acdc_h5_copy_of_whole_volumes_and_slices(acdc, roots, write_h5, xyz):
    data = roots / "acdc" / "data"
    image, label = (array.T for array in xyz(0, shape=(20, 18, 12)))
    write_h5(data / "patient001_frame01.h5", image=image, label=label)
    write_h5(data / "patient001_frame02.h5", image=image + 1, label=label)
    for z in range(12):  # 10 comes after 9
        write_h5(data / f"patient003_frame01_slice_{z + 1}.h5", image=image[z], label=label[z])
    refs = scan(acdc)
    assert [(ref.subject, ref.phase) for ref in refs] == [
        ("patient001", "ED"),
        ("patient001", "ES"),
        ("patient003", "ED"),
    ]
    whole, stacked = read(refs[0], acdc), read(refs[2], acdc)
    np.testing.assert_array_equal(whole.image, image[None])
    np.testing.assert_array_equal(stacked.image, whole.image)
    np.testing.assert_array_equal(stacked.label, whole.label)
    assert stacked.spacing_mm is None
    assert len(refs[2].files) == 12


def test_acdc_layouts_agree(acdc, roots, patient, write_h5, xyz):
    patient("", "patient001", 1, 12)
    official = read(scan(acdc)[0], acdc)
    image, label = xyz(0)
    write_h5(roots / "acdc" / "data" / "patient001_frame01.h5", image=image.T, label=label.T)
    copy = read(scan(acdc)[0], acdc)
    np.testing.assert_array_equal(copy.image, official.image)
    np.testing.assert_array_equal(copy.label, official.label)


# -------------------------------------------------------------------------------------------------- Decathlon, nnU-Net


def test_decathlon(msd, describe, xyz):
    dataset = describe()
    refs = scan(dataset)
    assert [(ref.subject, ref.label is not None) for ref in refs] == [("a", True), ("b", False), ("c", False)]
    assert class_names(dataset, msd) == {1: "rim", 2: "core"}
    volume = read(refs[0], dataset)
    np.testing.assert_array_equal(volume.image, xyz(0)[0].T[None])
    np.testing.assert_array_equal(volume.label, xyz(0)[1].T)
    np.testing.assert_allclose(volume.spacing_mm, (8, 1.4, 1.5))
    assert read(refs[1], dataset).label is None


def test_decathlon_with_channels(msd, describe, write_nifti, xyz):
    channels = np.stack([xyz(0)[0], xyz(1)[0]], axis=-1)
    write_nifti(msd / "imagesTr" / "a.nii.gz", channels)
    dataset = describe()
    np.testing.assert_array_equal(read(scan(dataset)[0], dataset).image, channels.T)
    dataset = describe(options={"channel": 1})
    np.testing.assert_array_equal(read(scan(dataset)[0], dataset).image, xyz(1)[0].T[None])


@pytest.fixture
def nnunet(roots, write_nifti, xyz):
    """An nnU-Net v2 folder with two channels: cases a (labelled), b_1 (not), c (of imagesTs)."""
    folder = roots / "Task"
    for number, (part, case) in enumerate([("imagesTr", "a"), ("imagesTr", "b_1"), ("imagesTs", "c")]):
        for channel in range(2):
            write_nifti(folder / part / f"{case}_{channel:04d}.nii.gz", xyz(number)[0] + 1000 * channel)
    write_nifti(folder / "labelsTr" / "a.nii.gz", xyz(0)[1])
    (folder / "imagesTr" / "._a_0000.nii.gz").write_bytes(b"left by a Mac")
    info = {
        "channel_names": {"0": "T2", "1": "ADC"},
        "labels": {"background": 0, "core": 2, "rim": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def test_two_labels_of_one_number_are_refused(nnunet, describe):
    info = json.loads((nnunet / "dataset.json").read_text())
    (nnunet / "dataset.json").write_text(json.dumps(info | {"labels": {"background": 0, "liver": 1, "tumour": 1}}))
    with pytest.raises(RequestError, match=r"gives labels 'liver' and 'tumour' one number \(1\)"):
        class_names(describe(channels=2), nnunet)
    (nnunet / "dataset.json").write_text(json.dumps({"labels": {"1": "heart", "2": "heart"}}))
    with pytest.raises(RequestError, match="gives 'heart' to two label values"):
        class_names(describe(channels=2), nnunet)
    with pytest.raises(ValueError, match="'heart' is the name of two label values"):
        describe(classes={1: "heart", 2: "heart"})


def test_nnunet(nnunet, describe, xyz):
    dataset = describe(channels=2)
    refs = scan(dataset)
    assert [(ref.subject, ref.label is not None) for ref in refs] == [("a", True), ("b_1", False), ("c", False)]
    assert class_names(dataset, nnunet) == {1: "rim", 2: "core"}
    volume = read(refs[0], dataset)
    np.testing.assert_array_equal(volume.image, np.stack([xyz(0)[0].T, xyz(0)[0].T + 1000]))
    np.testing.assert_array_equal(volume.label, xyz(0)[1].T)


# ---------------------------------------------------------------------------------------------- orientation and labels


@pytest.mark.parametrize("signs", list(itertools.product([1, -1], repeat=3)))
def test_every_axis_runs_toward_its_positive_world_axis(msd, describe, write_nifti, xyz, signs):
    image, label = xyz(0)
    upright = np.diag([1.5, 1.4, 8, 1.0])
    upright[:3, :3] = upright[:3, :3] @ np.array([[0.995, 0.1, 0], [-0.1, 0.995, 0], [0, 0, 1]])  # slightly oblique
    turn = np.eye(4)  # index of the turned array -> index of the upright one
    for axis, sign in enumerate(signs):
        if sign < 0:
            turn[axis, axis], turn[axis, 3] = -1, image.shape[axis] - 1
    turned = [axis for axis, sign in enumerate(signs) if sign < 0]
    write_nifti(msd / "imagesTr" / "a.nii.gz", np.flip(image, turned), upright @ turn)
    write_nifti(msd / "labelsTr" / "a.nii.gz", np.flip(label, turned), upright @ turn)
    volume = read(scan(describe())[0], describe())
    np.testing.assert_array_equal(volume.image[0], image.T)
    np.testing.assert_array_equal(volume.label, label.T)
    assert volume.flips == tuple(sign < 0 for sign in reversed(signs))
    np.testing.assert_allclose(volume.affine, upright @ turn, atol=1e-5)


def header(path, data, sform=None, qform=None, pixdim=None, kind=nib.Nifti1Image):
    """A NIfTI file whose sform, qform and pixdim may say different things, as tools leave it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = kind.header_class()
    about.set_data_shape(data.shape)
    about.set_data_dtype(data.dtype)
    about.set_sform(sform, code=int(sform is not None))
    about.set_qform(qform, code=int(qform is not None))
    about.set_zooms((*pixdim, *[1] * (data.ndim - 3)))
    nib.save(kind(data, None, about), path)


SCALE = np.diag([1.5625, 1.4, 10.0, 1])
PIXDIM = (1.5625, 1.4, 10)
UNSCALED = np.array([[0, 1.0, 0, -7], [1, 0, 0, 3], [0, 0, 1, 9], [0, 0, 0, 1]])


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("sform", "qform", "told"),
    [
        (np.eye(4), None, True),
        (np.eye(4), SCALE, True),
        (np.diag([-1.0, -1, 1, 1]), SCALE, True),
        (SCALE, SCALE, False),
        (SCALE, None, False),
        (None, SCALE, False),
        (None, None, False),
    ],
)
def test_voxels_are_of_pixdim_whatever_the_affine_says(sform, qform, told, kind, msd, describe, xyz):
    for part, data in zip(("imagesTr", "labelsTr"), xyz(0), strict=True):
        header(msd / part / "a.nii.gz", data, sform, qform, PIXDIM, kind)
    volume = read(scan(describe())[0], describe())
    assert volume.spacing_mm == pytest.approx(PIXDIM[::-1], rel=1e-6)
    assert [note for note in volume.notes if "pixdim" in note] == list(volume.notes)
    assert len(volume.notes) == told


def test_pixdim_goes_with_its_axis_where_axes_are_put_in_order(msd, describe, xyz):
    """Of an affine without scale whose x and y are exchanged, and of an image with channels."""
    for part, data in zip(("imagesTr", "labelsTr"), xyz(0), strict=True):
        header(msd / part / "a.nii.gz", data, UNSCALED, None, PIXDIM)
    volume = read(scan(describe())[0], describe())
    assert volume.spacing_mm == pytest.approx((10, 1.5625, 1.4))
    np.testing.assert_array_equal(volume.image[0], xyz(0)[0].transpose(2, 0, 1))
    header(msd / "imagesTr" / "a.nii.gz", np.stack([xyz(0)[0]] * 2, -1), UNSCALED, None, PIXDIM)
    assert read(scan(describe())[0], describe(channels=2)).spacing_mm == pytest.approx((10, 1.5625, 1.4))


def test_acdc_s_official_headers_give_the_spacing_of_pixdim(acdc, patient, xyz, capsys):
    """Their sform is without scale; the images are resampled to the same millimetres as with one."""
    folder = patient("", "patient001", 1, 12)
    good = prepare(acdc, Geometry(size=[32, 32], spacing_mm=2.8), progress=False)
    for path in folder.parent.glob("*/*_frame*.nii.gz"):
        data = np.asarray(nib.load(path).dataobj)
        header(path, data, np.eye(4), None, (1.5, 1.25, 10))
    store = prepare(acdc, Geometry(size=[32, 32], spacing_mm=2.8))
    assert store.volumes[["spacing_z", "spacing_y", "spacing_x"]].iloc[0].tolist() == [10, 1.25, 1.5]
    assert store.content == good.content
    said = capsys.readouterr().err
    assert said.count("pixdim is taken") == 1
    assert "(2 such files, this is the first)" in said


def test_a_mask_may_be_stored_in_another_order_than_its_image(msd, describe, write_nifti, xyz):
    _, label = xyz(0)
    affine = np.diag([1.5, 1.4, 8, 1])
    turn = affine @ np.array([[0, -1, 0, 33], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    write_nifti(msd / "labelsTr" / "a.nii.gz", label.transpose(1, 0, 2)[:, ::-1], turn)
    volume = read(scan(describe())[0], describe())
    np.testing.assert_array_equal(volume.label, label.T)


LIKE = np.diag([1.5, 1.4, 8, 1])


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.eye(4), ["its header was lost", "set options.label_header to image, which takes the header of the image"]),
        (np.diag([-1.0, -1, 1, 1]) @ LIKE, ["its affine mirrors x and y", "label_header to image", "else resample"]),
        (LIKE + np.eye(4, k=3) * 3, ["is shifted by 3 mm"]),
        (LIKE @ np.diag([2, 1, 1, 1]), ["voxels of 3 x 1.4 x 8 mm and not 1.5 x 1.4 x 8 mm"]),
        (LIKE[:, [1, 0, 2, 3]], ["its axes are turned"]),
    ],
)
def test_what_differs_between_mask_and_image_is_said_and_the_image_s_header_can_be_taken(
    affine, words, msd, describe, write_nifti, xyz
):
    write_nifti(msd / "labelsTr" / "a.nii.gz", xyz(0)[1], affine)
    with pytest.raises(RequestError) as error:
        read(scan(describe())[0], describe())
    assert [word for word in words if word not in str(error.value)] == []
    assert ("resample" in str(error.value)) == ("lost" not in words[0])
    dataset = describe(options={"label_header": "image"})
    np.testing.assert_array_equal(read(scan(dataset)[0], dataset).label, xyz(0)[1].T)


def test_label_values_become_indices_in_their_order():
    label = np.array([[[0, 600, 200, 500.0]]])
    indices = class_indices(label, {500: "left ventricle", 200: "myocardium", 600: "right ventricle"}, "file")
    assert indices.tolist() == [[[0, 3, 1, 2]]]
    assert indices.dtype == np.uint8
    assert class_indices(np.array([[[0, 3, -1]]]), {3: "b", -1: "a"}, "file").tolist() == [[[0, 2, 1]]]


def test_scan_opens_no_volume(msd, describe, monkeypatch):
    def opened(*args, **kwargs):
        raise AssertionError("a volume was opened")

    monkeypatch.setattr(nib, "load", opened)
    monkeypatch.setattr(h5py, "File", opened)
    assert len(scan(describe())) == 3


def test_phantom_needs_no_folder(monkeypatch, tmp_path, describe):
    monkeypatch.setenv("CLSEG_DATA", str(tmp_path / "absent"))
    dataset = describe(adapter="phantom", folder="", options={"subjects": 2}, phases=["ED"], classes=CLASSES)
    refs = scan(dataset)
    assert [ref.subject for ref in refs] == ["phantom000", "phantom001"]
    assert refs[0].stamp
    volume = read(refs[0], dataset)
    assert volume.label.max() == 3
    assert volume.spacing_mm is not None


# --------------------------------------------------------------------------------- data sets of params, as published

HEART = (0, 500, 205)  # background, left ventricle, myocardium, as their classes are numbered 0, 3, 1
PAIRS = {  # data set: image, label, values in the label file of background, rim and core; their class indices
    "mmwhs_mr": ("mr_train_1001_image.nii.gz", "mr_train_1001_label.nii.gz", HEART, (0, 3, 1)),
    "mmwhs_ct": ("ct_train_1001_image.nii.gz", "ct_train_1001_label.nii.gz", HEART, (0, 3, 1)),
    "hvsmr": (
        "Training_dataset_sx_cropped/training_sa_crop_pat0.nii.gz",
        "Ground_truth/training_sa_crop_pat0-label.nii.gz",
        (0, 1, 2),
        (0, 1, 2),
    ),
    "chd": ("ct_1001_image.nii.gz", "ct_1001_label.nii.gz", (14, 7, 3), (0, 7, 3)),
    "mscmr": ("patient1_C0.nii.gz", "patient1_C0_manual.nii.gz", (0, 200, 600), (0, 1, 3)),
    "isic2018": (
        "ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg",
        "ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png",
        (0, 0, 255),
        (0, 0, 1),
    ),
    "ph2": ("images/IMD002.png", "masks/IMD002_segmentation.png", (0, 0, 255), (0, 0, 1)),
}


@pytest.fixture
def published(roots, write_nifti, xyz):
    """Write a small copy of a data set in its published layout, subjects numbered from the first on; its volumes."""

    def write(name, count=1):
        dataset, written = read_dataset(name), []
        image_name, label_name, values, _ = PAIRS[name]
        first = re.findall(r"\d+", image_name.rpartition("/")[2])[0]
        for number in range(count):
            digits = str(int(first) + number).zfill(len(first))
            files = [roots / dataset.folder / name.replace(first, digits) for name in (image_name, label_name)]
            image, label = xyz(number)
            label = np.array(values)[label]
            if dataset.channels == 1:
                for path, array in zip(files, (image, label.astype(np.int16)), strict=True):
                    write_nifti(path, array, np.diag([-1.5, -1.4, 8, 1]))
            else:  # a photograph: the first three slices are its colours
                image, label = np.clip(image.T[:3], 0, 255).astype(np.uint8), label.T[:1].astype(np.uint8)
                for path, array in zip(files, (image, label), strict=True):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array.transpose(1, 2, 0).squeeze()).save(path)
            written.append((image, label))
        return dataset, written

    return write


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_as_published(published, name):
    dataset, written = published(name, 2)
    refs = scan(dataset)
    first, _ = (ref.subject for ref in refs)
    assert first == re.findall(r"(?:ISIC_|IMD|patient|pat)?\d+", PAIRS[name][0].rpartition("/")[2])[0]
    for ref, (image, label) in zip(refs, written, strict=True):
        volume = read(ref, dataset)
        values, indices = PAIRS[name][2:]
        expected = sum(
            np.where(label == value, index, 0) for value, index in dict(zip(values, indices, strict=True)).items()
        )
        if dataset.channels == 3:
            assert volume.image.shape == (3, 1, 30, 34)
            assert volume.spacing_mm is None
            assert np.abs(volume.image[:, 0] - image).mean() <= (0 if name == "ph2" else 20)  # JPEG loses
            np.testing.assert_array_equal(volume.label, expected)
        else:
            turned = dataset.options.get("orient", True)  # x and y of these files run to negative
            np.testing.assert_array_equal(volume.image[0], (image[::-1, ::-1] if turned else image).T)
            np.testing.assert_array_equal(volume.label, (expected[::-1, ::-1] if turned else expected).T)
            assert volume.slice_axis == ("z" if turned else "")
            assert volume.spacing_mm == pytest.approx((8, 1.4, 1.5))


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_prepared(published, name):
    dataset, _ = published(name, 2)
    for geometry in filter(None, (dataset.geometry["smoke"], dataset.geometry_3d.get("smoke"))):
        store = prepare(dataset, geometry, progress=False)
        assert store.images.shape[1:] == (dataset.channels, 32, 32)
        assert store.positions_known == (dataset.positions == "known")
        assert len(store.class_names) == len(dataset.classes)


def test_prostate_as_published(roots, write_nifti, xyz):
    """T2 and ADC in one file, labels 1 and 2 named by dataset.json, volumes for testing without labels."""
    folder = roots / "Task05_Prostate"
    for number, part in enumerate(("imagesTr", "imagesTs")):
        write_nifti(folder / part / f"prostate_0{number}.nii.gz", np.stack([xyz(number)[0], xyz(2)[0]], axis=-1))
    write_nifti(folder / "labelsTr" / "prostate_00.nii.gz", xyz(0)[1])
    info = {
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "training": [{"image": "./imagesTr/prostate_00.nii.gz", "label": "./labelsTr/prostate_00.nii.gz"}],
        "test": ["./imagesTs/prostate_01.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    dataset = read_dataset("msd_prostate")
    refs = scan(dataset)
    assert [ref.subject for ref in refs] == ["prostate_00", "prostate_01"]
    np.testing.assert_array_equal(read(refs[0], dataset).image, xyz(0)[0].T[None])
    assert class_names(dataset, folder) == {1: "PZ", 2: "TZ"}
    assert prepare(dataset, dataset.geometry["smoke"], progress=False).labelled_subjects == ("prostate_00",)


def test_every_data_set_is_tested_in_its_layout():
    assert {*PAIRS, "msd_prostate", "acdc", "hippocampus", "phantom"} == set(known_names("datasets"))


def test_absent_folder_is_answered_with_source_terms_and_tree(roots):
    with pytest.raises(RequestError) as error:
        scan(read_dataset("hippocampus"))
    told = (roots / "Task04_Hippocampus", "medicaldecathlon.com", "CC BY-SA 4.0", "imagesTr/hippocampus_001")
    assert all(str(part) in str(error.value) for part in told)


def test_masks_beside_photographs_are_no_images_and_may_be_absent(published, roots):
    dataset, _ = published("ph2")
    image, mask = roots / "ph2" / "images" / "IMD002.png", roots / "ph2" / "masks" / "IMD002_segmentation.png"
    beside = {"images": "images/{subject}.png", "labels": "images/{subject}_segmentation.png"}
    mask.rename(image.with_name(mask.name))
    assert [ref.subject for ref in scan(dataset.model_copy(update={"options": beside}))] == ["IMD002"]
    image.with_name(mask.name).unlink()
    assert read(scan(dataset)[0], dataset).label is None


def test_h5_without_label_is_unlabelled(acdc, roots, write_h5):
    write_h5(roots / "acdc" / "data" / "patient001_frame01.h5", image=np.eye(3)[None])
    assert read(scan(acdc)[0], acdc).label is None


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real_data
def test_real_acdc(data_root):
    dataset = read_dataset("acdc").model_copy(update={"phases": []})
    refs = scan(dataset)
    assert len(refs) == 200
    blood = {}
    for ref in [ref for ref in refs if ref.subject in ("patient001", "patient003", "patient100")]:
        volume = read(ref, dataset)
        blood[ref.subject, ref.phase] = (volume.label == 3).sum()
        area = (volume.label > 0).sum(axis=(1, 2))
        assert area[: len(area) // 2].sum() > area[(len(area) + 1) // 2 :].sum()  # the base comes first
    for subject in ("patient001", "patient003", "patient100"):
        assert blood[subject, "ED"] > blood[subject, "ES"]


@pytest.mark.real_data
def test_real_hippocampus(data_root):
    dataset = read_dataset("hippocampus")
    refs = scan(dataset)
    assert len(refs) == 260
    volume = read(refs[0], dataset)
    assert volume.image.shape == (1, 35, 51, 35)
    assert class_names(dataset, data_root / dataset.folder) == {1: "Anterior", 2: "Posterior"}
    # axis y runs from posterior to anterior
    y = [np.nonzero(volume.label == index)[1].mean() for index in (1, 2)]
    assert y[0] > y[1]


@pytest.mark.real_data
def test_real_mscmr(data_root):
    """The apex comes first in every volume, whatever the affine says."""
    dataset = read_dataset("mscmr")
    refs = scan(dataset)
    assert len(refs) == 35
    for ref in refs[::6]:
        volume = read(ref, dataset)
        area = (volume.label > 0).sum(axis=(1, 2))
        labelled = np.flatnonzero(area)
        assert area[labelled[0]] < area[labelled[len(labelled) // 2 :]].max()
        assert set(np.unique(volume.label)) <= {0, 1, 2, 3}
        middle = labelled[len(labelled) // 2]
        assert all((volume.label[middle] == index).any() for index in (1, 2, 3))
        assert volume.image.shape[2:] == (192, 192)


@pytest.mark.real_data
def test_real_ph2(data_root):
    dataset = read_dataset("ph2")
    refs = scan(dataset)
    assert len(refs) == 200
    volume = read(refs[0], dataset)
    assert volume.image.shape == (3, 1, 192, 256)
    lesion = volume.label > 0
    assert 0.01 < lesion.mean() < 0.99
    assert volume.image[:, lesion].mean() < volume.image[:, ~lesion].mean()  # lesions are dark
