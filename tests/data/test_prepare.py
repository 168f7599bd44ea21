"""The prepared store: preprocessing, tables, the way back to the native grid, and that it is complete or absent."""

import json
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clseg import paths
from clseg.data import prepare as module
from clseg.data.prepare import cut_voxels, normalise, prepare, resampled_size, to_network
from clseg.data.splits import make_split
from clseg.data.store import Store, to_native
from clseg.data.volume import Volume
from clseg.errors import RequestError
from clseg.settings import Geometry, Normalisation
from clseg.study.files import read_dataset

NATIVE = Geometry(size=[32, 64])


def volume_of(image, label=None, spacing_mm=None):
    return Volume(np.asarray(image, np.float32), label, spacing_mm, "s", "")


def dice(first, second):
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def one_hot(labels, classes):
    return F.one_hot(torch.from_numpy(np.array(labels)).long(), classes).movedim(-1, 1).float()  # [Z, K, H, W]


# ------------------------------------------------------------------------------------------------------- preprocessing


def test_percentiles_become_zero_and_one_per_channel_and_nothing_is_clipped():
    rng = np.random.default_rng(0)
    image = rng.gamma(2, size=(2, 3, 20, 20)).astype(np.float32) * np.array([1, 1000])[:, None, None, None]
    scaled = normalise(volume_of(image), Normalisation(low=1, high=99), "file")
    for channel in range(2):
        np.testing.assert_allclose(np.percentile(scaled[channel], [1, 99]), [0, 1], atol=1e-5)
        assert scaled[channel].min() < 0
        assert scaled[channel].max() > 1
    wide = normalise(volume_of(image), Normalisation(low=0, high=100), "file")
    assert (wide.min(), wide.max()) == (0, 1)


def test_image_that_is_nearly_constant_is_refused():
    image = np.zeros((1, 2, 40, 40))
    image[0, 0, 0, 0] = 1
    with pytest.raises(RequestError, match=r"^file: percentiles 1 and 99 .* both 0"):
        normalise(volume_of(image), Normalisation(), "file")


@pytest.mark.parametrize(
    ("spacing_mm", "geometry", "expected"),
    [
        ((10, 1.5, 1.25), Geometry(size=[32, 32], spacing_mm=3.0, step_px=9), (2, 50, 42)),
        (None, Geometry(size=[32, 32], spacing_mm=3.0, step_px=3), (2, 33, 33)),
        ((10, 1.5, 1.25), Geometry(size=[32, 32], step_px=2), (2, 50, 50)),
        (None, Geometry(size=[32, 32]), (2, 100, 100)),
    ],
)
def test_spacing_decides_where_it_is_known_and_the_step_elsewhere(spacing_mm, geometry, expected):
    assert resampled_size(volume_of(np.zeros((1, 2, 100, 100)), spacing_mm=spacing_mm), geometry) == expected


def test_downsampling_averages():
    stripes = np.tile([0.0, 1.0], 32) * np.ones((1, 1, 64, 1), np.float32)
    image, _ = to_network(stripes.astype(np.float32), None, (1, 16, 16), [32, 32])
    assert np.abs(image[0, 0, 8:24, 10:22].astype(float) - 0.5).max() < 0.05


def test_padding_is_zero_and_cropping_keeps_the_centre():
    image = np.arange(1, 41, dtype=np.float32) * np.ones((1, 1, 20, 1), np.float32)
    label = (image[0] > 20).astype(np.uint8)
    slices, labels = to_network(image, label, (1, 20, 40), [32, 32])
    assert slices.dtype == np.float16
    assert (slices[0, 0, :6] == 0).all()
    assert (slices[0, 0, 26:] == 0).all()
    np.testing.assert_array_equal(slices[0, 0, 6], np.arange(5, 37))
    np.testing.assert_array_equal(labels[0, 6], np.arange(5, 37) > 20)


def test_outliers_stay_finite_in_half_precision():
    image = np.zeros((1, 1, 32, 32), np.float32)
    image[..., 3, 4] = 1e9
    slices, _ = to_network(image, None, (1, 32, 32), [32, 32])
    assert np.isfinite(slices).all()


@given(
    native=st.tuples(st.integers(24, 90), st.integers(24, 90)),
    step_px=st.floats(0.5, 3.0),
    size=st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96])),
)
@settings(max_examples=60, deadline=None)
def test_the_way_back_lands_where_it_came_from(native, step_px, size):
    resampled = resampled_size(volume_of(np.zeros((1, 1, *native))), Geometry(size=list(size), step_px=step_px))
    y, x = np.ogrid[: native[0], : native[1]]
    seen = [min(n, s * n / r) for n, s, r in zip(native, size, resampled[1:], strict=True)]  # part that is not cropped
    radius = 0.4 * min(seen)
    label = (np.hypot(y - native[0] / 2 + 0.5, x - native[1] / 2 + 0.5) < radius).astype(np.uint8)[None]
    _, small = to_network(np.zeros((1, *label.shape), np.float32), label, resampled, list(size))
    back = to_native(one_hot(small, 2), resampled[1:], (1, *native))
    assert back.shape == label.shape
    assert dice(back > 0, label > 0) > 0.89  # the worst of a disc of five coarse pixels
    for found, wanted in zip(np.argwhere(back).mean(0), np.argwhere(label).mean(0), strict=True):
        assert abs(found - wanted) < 0.25 + 0.35 * step_px


def test_outside_the_crop_is_background():
    probability = torch.zeros(2, 3, 32, 32)
    probability[:, 2] = 1
    back = to_native(probability, (40, 50), (2, 80, 100))
    assert (back[:, 20:60, 40:60] == 2).all()
    assert (back[:, :6] == 0).all()
    assert (back[:, :, :16] == 0).all()


def test_missing_simpleitk_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    image = np.random.default_rng(0).normal(size=(1, 2, 8, 8))
    with pytest.raises(RequestError, match=r"clseg\[n4\]"):
        normalise(volume_of(image), Normalisation(n4=True), "file")


@pytest.mark.n4
def test_n4_flattens_a_bias_field():
    pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48] / 48
    tissue = np.where(np.hypot(y - 0.5, x - 0.5) < 0.3, 200.0, 100.0)
    image = (tissue * np.exp(0.8 * (x - 0.5)) + rng.normal(0, 2, (6, 48, 48)))[None]
    tilt = {}
    for n4 in (False, True):
        scaled = normalise(volume_of(image, spacing_mm=(8, 1.5, 1.5)), Normalisation(n4=n4), "file")[0]
        tilt[n4] = abs(scaled[:, :8, -12:].mean() - scaled[:, :8, :12].mean())
    assert tilt[True] < 0.3 * tilt[False]


# --------------------------------------------------------------------------------------------------------------- store


@pytest.fixture
def dataset(msd, describe):
    return describe()


def test_store(dataset, xyz):
    store = prepare(dataset, NATIVE, progress=False)
    assert store.class_names == {1: "rim", 2: "core"}
    assert (store.num_classes, store.channels, store.size) == (3, 1, [32, 64])
    assert store.subjects == ("a", "b", "c")
    assert store.labelled_subjects == ("a",)
    assert store.positions_known
    assert store.images.shape == (15, 1, 32, 64)
    assert store.images.dtype == np.float16
    assert store.labels.shape == (15, 32, 64)
    assert store.volumes["slices"].tolist() == [5, 5, 5]
    np.testing.assert_allclose(store.volumes.loc[0, ["spacing_z", "spacing_y", "spacing_x"]].tolist(), [8, 1.4, 1.5])
    assert store.slices.columns.tolist() == ["volume", "slice", "slices_in_volume", "position"]
    assert store.slices.index.tolist() == list(range(15))
    assert store.slices["position"].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0] * 3)
    assert store.rows(["b", "a"]).tolist() == list(range(10))
    assert store.rows(["a", "c"], labelled=True).tolist() == [0, 1, 2, 3, 4]
    assert store.rows(["a", "c"], labelled=False).tolist() == [10, 11, 12, 13, 14]
    assert store.volume_rows(1).tolist() == [5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="nobody"):
        store.rows(["a", "nobody"])
    np.testing.assert_array_equal(store.native_label(0), xyz(0)[1].T)
    with pytest.raises(ValueError, match="has no label"):
        store.native_label(1)


def test_native_grid_is_kept_exactly(dataset, xyz):
    store = prepare(dataset, NATIVE, progress=False)
    image = xyz(0)[0].T
    low, high = np.percentile(image, [1, 99])
    kept = store.images[:5, 0, 1:31, 15:49].astype(np.float32)  # 30 of 32 rows, 34 of 64 columns
    np.testing.assert_allclose(kept, (image - low) / (high - low), atol=2e-3)
    back = store.to_native(0, one_hot(store.labels[:5], 3))
    np.testing.assert_array_equal(back, store.native_label(0))
    with pytest.raises(ValueError, match=r"\[5, 3, 32, 64\]"):
        store.to_native(0, torch.zeros(5, 2, 32, 64))


@pytest.mark.filterwarnings("error")
def test_batch(dataset):
    store = prepare(dataset, NATIVE, progress=False)
    batch = store.batch(np.array([4, 0, 2]))
    assert batch.image.shape == (3, 1, 32, 64)
    assert batch.image.dtype == torch.float32
    np.testing.assert_array_equal(batch.image.numpy(), store.images[[4, 0, 2]])
    assert batch.label.dtype == torch.int64
    np.testing.assert_array_equal(batch.label.numpy(), store.labels[[4, 0, 2]])
    assert batch.row.tolist() == [4, 0, 2]
    assert batch.position.tolist() == pytest.approx([1.0, 0.2, 0.6])
    mixed = store.batch([0, 12])
    assert mixed.label is None
    assert mixed.volume.tolist() == mixed.subject.tolist() == [0, 2]


def test_several_volumes_per_subject(roots, describe, write_h5, xyz):
    for number, (name, frame) in enumerate([("patient002", 1), ("patient001", 1), ("patient001", 2)]):
        image, label = xyz(number)
        write_h5(roots / "acdc" / "data" / f"{name}_frame{frame:02d}.h5", image=image.T, label=label.T)
    store = prepare(describe(adapter="acdc", folder="acdc", classes={1: "rim", 2: "core"}), NATIVE, progress=False)
    assert store.volumes[["subject", "phase"]].to_numpy().tolist() == [
        ["patient001", "ED"],
        ["patient001", "ES"],
        ["patient002", "ED"],
    ]
    assert store.batch([0, 5, 10]).subject.tolist() == [0, 0, 1]
    assert np.isnan(store.volumes["spacing_y"]).all()


def test_channels(msd, describe, write_nifti, xyz):
    for number, (part, name) in enumerate([("imagesTr", "a"), ("imagesTr", "b"), ("imagesTs", "c")]):
        write_nifti(msd / part / f"{name}.nii.gz", np.stack([xyz(number)[0], xyz(number + 3)[0]], axis=-1))
    assert prepare(describe(channels=2), NATIVE, progress=False).images.shape[1] == 2
    assert prepare(describe(options={"channel": 1}), NATIVE, progress=False).images.shape[1] == 1
    with pytest.raises(RequestError, match=r"a\.nii\.gz: has 2 channels .* declares 1"):
        prepare(describe(), NATIVE, progress=False)


def rotated(affine, degrees, axis):
    """An affine turned in the world around x (0), y or z."""
    a, b = [k for k in range(3) if k != axis]
    turn, angle = np.eye(4), np.deg2rad(degrees)
    turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return turn @ affine


def test_a_folder_that_mixes_orders_is_made_one(msd, describe, write_nifti, xyz, capsys):
    """Cubic voxels: nothing but the order of most says which axis is that of slices. One of three is stored y, z, x."""
    for part, seed in (("imagesTr/a", 0), ("labelsTr/a", 0), ("imagesTr/b", 1), ("imagesTs/c", 2)):
        write_nifti(msd / f"{part}.nii.gz", xyz(seed)[part.startswith("labels")], np.eye(4))
    plain = prepare(describe(), NATIVE)
    assert "axis" not in capsys.readouterr().err
    for part in ("images", "labels"):
        array = xyz(0)[part == "labels"].transpose(1, 2, 0)
        write_nifti(msd / f"{part}Tr/a.nii.gz", array[::-1], np.eye(4)[:, [1, 2, 0, 3]] @ reversed_x(30))
    mixed = prepare(describe(), NATIVE)
    said = "imagesTr/a.nii.gz: its slices run along another axis than those of most: it is cut anew, along z"
    assert said in capsys.readouterr().err
    assert (mixed.content, mixed.folder == plain.folder) == (plain.content, False)


def reversed_x(size):
    """The index of an array whose first axis is reversed -> that of the other."""
    turn = np.diag([-1.0, 1, 1, 1])
    turn[0, 3] = size - 1
    return turn


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 2, 1), (1, 2, 0), (1, 0, 2)])
def test_thick_slices_are_slices_in_whichever_order_they_are_stored(order, msd, describe, write_nifti, xyz):
    plain, affine = prepare(describe(), NATIVE, progress=False), np.diag([1.5, 1.4, 8, 1])
    for part, seed in (("imagesTr/a", 0), ("labelsTr/a", 0), ("imagesTr/b", 1), ("imagesTs/c", 2)):
        array = xyz(seed)[part.startswith("labels")].transpose(order)
        write_nifti(msd / f"{part}.nii.gz", array[::-1], affine[:, [*order, 3]] @ reversed_x(len(array)))
    assert prepare(describe(), NATIVE, progress=False).content == plain.content


def test_oblique_thick_slices_stay_slices_and_positions_are_then_unknown(msd, describe, write_nifti, xyz):
    """Short-axis views: their normals lie between the world's axes, nearer to another one in every second patient."""
    for part, seed, degrees in (("imagesTr/a", 0, 40), ("imagesTr/b", 1, 40), ("imagesTs/c", 2, 50)):
        write_nifti(msd / f"{part}.nii.gz", xyz(seed)[0], rotated(np.diag([1.5, 1.4, 8, 1]), degrees, 0))
    (msd / "labelsTr" / "a.nii.gz").unlink()
    store = prepare(describe(), NATIVE, progress=False)
    assert store.volumes["slice_axis"].tolist() == ["z", "z", "y"]
    assert store.volumes["spacing_z"].tolist() == pytest.approx([8, 8, 8])
    assert not store.positions_known


def test_labelled_voxels_that_the_grid_cuts_off_are_told_with_their_share(msd, describe, write_nifti, xyz, capsys):
    image, label = np.zeros((60, 30, 5), np.float32), np.zeros((60, 30, 5), np.uint8)
    label[4:12, 10:20], label[30:40, 10:12] = 1, 2  # 14 of 60 columns are cut on each side of 32
    for part, array in (("imagesTr", image + label + np.arange(5)), ("labelsTr", label)):
        write_nifti(msd / part / "a.nii.gz", array)
    prepare(describe(), Geometry(size=[32, 32]))
    said = capsys.readouterr().err
    assert "the grid [32, 32] cuts off 80 % of the labelled voxels (in 1 of 1 volumes" in said
    assert said.count("labelled voxels") == 1
    prepare(describe(), Geometry(size=[32, 64]))
    assert "labelled" not in capsys.readouterr().err


@pytest.mark.parametrize(("native", "resampled", "size"), [(60, 60, 32), (61, 61, 32), (60, 45, 32), (20, 20, 32)])
def test_what_is_counted_as_cut_is_what_the_network_does_not_see(native, resampled, size):
    for column in range(native):
        label = np.zeros((1, 8, native), np.uint8)
        label[..., column] = 1
        _, seen = to_network(np.zeros((1, 1, 8, native), np.float32), label, (1, 8, resampled), [8, size])
        cut = cut_voxels(label, (1, 8, resampled), [8, size])
        assert cut in (0, 8)
        if native == resampled:
            assert bool(cut) == (not seen.any())


def test_second_time_opens_without_reading(dataset, monkeypatch):
    first = prepare(dataset, NATIVE, progress=False)

    def read(*_):
        raise AssertionError("a volume was read")

    monkeypatch.setattr(module, "read", read)
    assert prepare(dataset, NATIVE, progress=False).folder == first.folder
    retitled = dataset.model_copy(update={"title": "another", "description": "another"})
    assert prepare(retitled, NATIVE, progress=False).folder == first.folder
    assert Store(first.folder).subjects == first.subjects


def test_where_the_files_are_absent_a_store_that_was_made_of_them_will_do(dataset, msd, capsys):
    """But no store of another description, of another grid, or one of several that differ. It is said."""
    made = prepare(dataset, NATIVE, progress=False)
    msd.rename(msd.with_name("away"))
    capsys.readouterr()
    again = prepare(dataset, NATIVE)
    told = f"example: {msd} is not here; {made.folder}, which was made of it, is used\n"
    assert capsys.readouterr().err == told
    assert (again.folder, again.content, again.subjects) == (made.folder, made.content, made.subjects)
    assert np.array_equal(again.images, made.images)
    assert np.array_equal(again.labels, made.labels)
    for other, geometry in (
        (dataset.model_copy(update={"normalisation": Normalisation(low=2)}), NATIVE),
        (dataset.model_copy(update={"name": "another"}), NATIVE),
        (dataset, Geometry(size=[32, 32])),
    ):
        with pytest.raises(RequestError, match=rf"Task: data set '{other.name}' is not there; "):
            prepare(other, geometry, progress=False)
    shutil.copytree(made.folder, made.folder.with_name("example-copy"))
    assert prepare(dataset, NATIVE, progress=False).content == made.content
    index = made.folder.with_name("example-copy") / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"content": "other"}))
    with pytest.raises(RequestError, match="are made of unlike files of data set example; remove one"):
        prepare(dataset, NATIVE, progress=False)
    shutil.rmtree(made.folder)
    shutil.rmtree(index.parent)
    with pytest.raises(RequestError, match="Task: data set 'example' is not there; "):
        prepare(dataset, NATIVE, progress=False)


def test_key_follows_everything_that_decides(dataset, msd):
    def folder(dataset=dataset, geometry=NATIVE):
        return prepare(dataset, geometry, progress=False).folder

    seen = {folder()}
    for changed in (
        {"normalisation": Normalisation(low=2)},
        {"classes": {1: "one", 2: "two"}},
        {"positions": "unknown"},
        {"options": {"channel": 0}},
    ):
        seen.add(folder(dataset.model_copy(update=changed)))
    seen.add(folder(geometry=Geometry(size=[32, 32])))
    seen.add(folder(geometry=Geometry(size=[32, 64], step_px=2)))
    os.utime(msd / "imagesTr" / "a.nii.gz", ns=(1, 1))
    seen.add(folder())
    (msd / "labelsTr" / "a.nii.gz").unlink()
    seen.add(folder())
    assert len(seen) == 9


def test_content_follows_images_masks_and_the_classes_of_dataset_json(dataset, msd, write_nifti, xyz):
    def content():
        return prepare(dataset, NATIVE, progress=False).content

    seen = {content()}
    os.utime(msd / "imagesTr" / "a.nii.gz", ns=(1, 1))  # the same files at another time
    assert content() in seen
    info = json.loads((msd / "dataset.json").read_text())
    (msd / "dataset.json").write_text(json.dumps(info | {"labels": {"0": "background", "1": "core", "2": "rim"}}))
    seen.add(content())
    image, label = xyz(0)
    write_nifti(msd / "labelsTr" / "a.nii.gz", np.where(label == 1, 2, label))
    seen.add(content())
    write_nifti(msd / "imagesTr" / "a.nii.gz", image + label)
    seen.add(content())
    assert len(seen) == 4


def test_prepared_at_once_is_prepared_once(dataset, monkeypatch):
    reads, stores, read = [], [], module.read

    def counted(ref, *others):
        reads.append(ref.subject)
        return read(ref, *others)

    monkeypatch.setattr(module, "read", counted)
    threads = [
        threading.Thread(target=lambda: stores.append(prepare(dataset, NATIVE, progress=False))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4
    assert len({store.folder for store in stores}) == 1
    assert sorted(reads) == ["a", "b", "c"]


def test_nothing_is_left_of_a_preparation_that_failed(dataset, monkeypatch):
    def read(ref, *others, read=module.read):
        if ref.subject == "c":
            raise KeyboardInterrupt
        return read(ref, *others)

    with monkeypatch.context() as patch:
        patch.setattr(module, "read", read)
        with pytest.raises(KeyboardInterrupt):
            prepare(dataset, NATIVE, progress=False)
    assert not [entry for entry in paths.prepared_root().iterdir() if entry.is_dir()]
    assert len(prepare(dataset, NATIVE, progress=False).volumes) == 3


def test_leftover_of_a_killed_process_is_replaced(dataset):
    folder = prepare(dataset, NATIVE, progress=False).folder
    folder.rename(folder.with_name(f".{folder.name}.partial"))
    (folder.with_name(f".{folder.name}.partial") / "images.f16").write_bytes(b"half")
    assert prepare(dataset, NATIVE, progress=False).images.shape == (15, 1, 32, 64)
    assert [entry.name for entry in paths.prepared_root().iterdir() if entry.is_dir()] == [folder.name]


@pytest.mark.parametrize("name", ["images.f16", "labels.u8", "index.json", "native_labels.zlib"])
def test_damaged_store_is_refused(dataset, name):
    folder = prepare(dataset, NATIVE, progress=False).folder
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(RequestError, match=rf"{name}: is incomplete; delete"):
        prepare(dataset, NATIVE, progress=False).native_label(0)


def test_output_that_cannot_be_written_is_one_sentence(dataset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "file"))
    with pytest.raises(RequestError, match=r"cannot be written .*--out"):
        prepare(dataset, NATIVE, progress=False)


def test_hundreds_of_cases_open_fast(msd, describe, write_nifti, xyz):
    """Opening again looks at names, sizes and times only: below a millisecond per volume."""
    for n in range(300):
        write_nifti(msd / "imagesTr" / f"{n}.nii.gz", xyz(n, shape=(8, 8, 2))[0])
    info = json.loads((msd / "dataset.json").read_text())
    info |= {"training": [{"image": f"imagesTr/{n}.nii.gz"} for n in range(300)], "test": []}
    (msd / "dataset.json").write_text(json.dumps(info))
    store = prepare(describe(), Geometry(size=[32, 32]), progress=False)
    assert len(store.volumes) == 300
    best_s = min(_seconds(lambda: prepare(describe(), Geometry(size=[32, 32]), progress=False)) for _ in range(3))
    assert best_s < 0.3


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------------------- 3-D

BLOCKS = Geometry(size=[4, 16, 32], plane=[32, 48], slice_mm=4.0)  # five slices of 8 mm become ten


def test_slices_are_resampled_with_antialiasing_and_back(dataset):
    stripes = np.tile([0.0, 1.0], 16)[:, None, None] * np.ones((32, 8, 8))
    label = (np.arange(32)[:, None, None] >= 12) * np.ones((32, 8, 8), np.uint8)
    image, classes = to_network(stripes[None].astype(np.float32), label, (8, 8, 8), [8, 8])
    assert np.abs(image[1:-1].astype(float) - 0.5).max() < 0.05
    assert classes[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    _, fine = to_network(stripes[None].astype(np.float32), np.roll(label, -2, axis=0), (8, 8, 8), [8, 8])
    assert fine[:, 0, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0]  # 10 lies nearest to the centre 9.5, 30 to 29.5
    back = to_native(one_hot(classes, 2), (8, 8), (32, 8, 8))
    np.testing.assert_array_equal(back, label)
    ramp = np.arange(8, dtype=np.float32)[None, :, None, None] * np.ones((1, 8, 8, 8), np.float32)
    image, _ = to_network(ramp, None, (16, 8, 8), [8, 8])
    np.testing.assert_allclose(image[1:-1, 0, 0, 0], np.arange(0.25, 7, 0.5), atol=1e-3)


def test_store_of_blocks(dataset, xyz):
    store = prepare(dataset, BLOCKS, progress=False)
    assert (store.size, store.dimensions, store.plane) == ([4, 16, 32], 3, [32, 48])
    assert store.images.shape == (30, 1, 32, 48)
    assert store.slices["position"].tolist() == pytest.approx([m / 10 for m in range(1, 11)] * 3)
    np.testing.assert_array_equal(store.native_label(0), xyz(0)[1].T)
    np.testing.assert_array_equal(store.to_native(0, one_hot(store.labels[:10], 3)), store.native_label(0))


@pytest.mark.parametrize(("row", "first"), [(0, 0), (2, 0), (5, 3), (9, 6), (10, 10), (19, 16)])
def test_block_lies_around_its_slice_and_inside_its_volume(dataset, row, first):
    store = prepare(dataset, BLOCKS, progress=False)
    batch = store.batch([row, 0])
    np.testing.assert_array_equal(batch.image[0, 0], store.images[first : first + 4, 0, 8:24, 8:40])
    assert batch.image.shape == (2, 1, 4, 16, 32)
    if row < 10:
        np.testing.assert_array_equal(batch.label[0], store.labels[first : first + 4, 8:24, 8:40])
    assert batch.row.tolist() == [row, 0]


def test_blocks_at_drawn_corners_differ_and_repeat(dataset):
    store = prepare(dataset, BLOCKS, progress=False)
    first, again = (store.batch([5] * 40, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first.image, again.image)
    planes = store.images[3:7, 0]
    found = {
        (y, x)
        for image in first.image[:, 0].numpy()
        for y in range(17)
        for x in range(17)
        if (image == planes[:, y : y + 16, x : x + 32]).all()
    }
    assert len(found) > 30
    assert {0, 16} & {y for y, _ in found} or max(y for y, _ in found) > 12
    assert torch.equal(first.label > 0, again.label > 0)


@pytest.mark.parametrize("geometry", [NATIVE, BLOCKS])
def test_what_stays_on_a_device_is_what_the_files_hold(dataset, geometry, monkeypatch):
    files, kept = prepare(dataset, geometry, progress=False), prepare(dataset, geometry, progress=False)
    rows = files.rows(files.labelled_subjects)[[4, 0, 2]]
    expected = files.batch(rows, generator=torch.Generator().manual_seed(0))
    assert set(files._resident.values()) == {None}
    monkeypatch.setattr("clseg.data.store.resident_bytes", lambda _: 2**63)
    one, other, hidden = (kept.rows([subject])[:1] for subject in kept.subjects)
    seen = kept.only(kept.subjects[:1], kept.subjects[1:2])
    found = kept.batch(rows, generator=torch.Generator().manual_seed(0))
    assert all(isinstance(tensor, torch.Tensor) for tensor in kept._resident.values())
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"images of .* must not be seen here"):
        seen.batch(hidden)
    assert torch.equal(seen.batch(one).label, files.batch(one).label)
    assert seen.batch(other).label is None


def test_short_volume_is_padded_around(dataset):
    store = prepare(dataset, Geometry(size=[8, 32, 32]), progress=False)
    batch = store.batch([2])
    np.testing.assert_array_equal(batch.image[0, 0, 1:6], store.images[:5, 0])
    assert (batch.image[0, 0, [0, 6, 7]] == 0).all()
    assert (batch.label[0, [0, 6, 7]] == 0).all()


def test_photographs_are_resized_whole(dataset):
    store = prepare(dataset, Geometry(size=[32, 64], resize=True, spacing_mm=9.0), progress=False)
    assert (store.images[0, 0, 0] != 0).mean() > 0.9  # nothing is padded
    assert dice(store.to_native(0, one_hot(store.labels[:5], 3)) > 0, store.native_label(0) > 0) > 0.95


# ------------------------------------------------------------------------------------------------- data sets of params


def test_phantom(roots):
    dataset = read_dataset("phantom").model_copy(update={"options": {"subjects": 2}})
    store = prepare(dataset, dataset.geometry["laptop"], progress=False)
    assert store.positions_known
    assert store.labelled_subjects == ("phantom000", "phantom001")
    back = store.to_native(0, one_hot(store.labels[store.volume_rows(0)], 4))
    for index in store.class_names:
        assert dice(back == index, store.native_label(0) == index) > 0.85


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "volumes", "lowest"),
    [("acdc", 100, 0.5), ("hippocampus", 260, 0.85), ("mscmr", 35, 0.5), ("ph2", 200, 0.85)],
)
def test_real_data_at_smoke_size(data_root, tmp_path, monkeypatch, name, volumes, lowest):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    dataset = read_dataset(name)
    store = prepare(dataset, dataset.geometry["smoke"], progress=False)
    assert len(store.volumes) == volumes
    assert store.positions_known == (name != "ph2")
    for protocol in dataset.protocols.values():
        two = sorted(getattr(protocol, "labelled", {1: {}, 2: {}}))[1]  # or the least number above 1 of published lists
        split = make_split(protocol, store.subjects, store.labelled_subjects, two, 1)
        assert len(store.rows(split.labelled, labelled=True)) >= 2 * store.volumes["slices"].min()
    for volume in range(0, volumes, 20):
        back = store.to_native(volume, one_hot(store.labels[store.volume_rows(volume)], store.num_classes))
        for index in store.class_names:
            assert dice(back == index, store.native_label(volume) == index) > lowest


@pytest.mark.real_data
def test_real_volumes_in_blocks(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    dataset = read_dataset("hippocampus")
    store = prepare(dataset, dataset.geometry_3d["smoke"], progress=False)
    slices, depth = store.volumes["slices"], store.size[0]
    assert slices.min() > depth  # blocks of one volume differ
    for volume in range(0, 260, 50):
        back = store.to_native(volume, one_hot(store.labels[store.volume_rows(volume)], 3))
        for index in store.class_names:
            assert dice(back == index, store.native_label(volume) == index) > 0.8


@pytest.mark.real_data
def test_real_acdc_at_its_native_grid_keeps_the_labels(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    dataset = read_dataset("acdc")
    store = prepare(dataset, dataset.geometry["paper"], progress=False)
    kept = sum((store.labels[store.volume_rows(v)] > 0).sum() for v in range(100))
    assert kept / sum((store.native_label(v) > 0).sum() for v in range(100)) > 0.999
