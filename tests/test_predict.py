"""Prediction: what fine-tuning scored, on the grid and with the label values of the user's own files."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from clseg.data.formats import class_names, scan
from clseg.data.phantom import phantom_volume
from clseg.errors import RequestError
from clseg.metrics import dice
from clseg.study import runs
from clseg.study.files import read_dataset
from clseg.study.parameters import FinetuneParameters
from clseg.tools import cli
from clseg.tools.export import read_weights
from clseg.tools.predict import cases, predict, segment_field, weights_of

SMALL = ["dataset.options.subjects=8", "dataset.protocols.seeded.test=2", "dataset.protocols.seeded.validation=1"]
FEW = ["finetune.steps=30", "finetune.validate_every=10", "geometry.spacing_mm=9.5"]  # 32 of them hold every phantom
OBLIQUE = np.array([[-1.1, 0.2, 0.1, 30], [0.2, -1.2, 0.1, -7], [-0.1, 0.1, 2.0, 11], [0, 0, 0, 1]])


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture(scope="module", params=[2, 3])
def trained(request, tmp_path_factory):
    """A fine-tuning of phantoms, a few steps long, in 2-D and in 3-D."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEG_OUT", str(tmp_path_factory.mktemp("trained")))
        fields = {"dataset": "phantom", "profile": "smoke", "method": "random", "dimensions": request.param}
        run = runs.do(runs.finetune_run(FinetuneParameters(**fields, overrides=[*SMALL, *FEW])))
        yield run.folder / "weights.safetensors", run.read("metrics").set_index(["subject", "class_name"])["dice"]


@pytest.fixture
def weights(tmp_path, save_weights):
    """Makes a weight file of an untrained network: three classes whose values are 200, 500 and 600."""

    def make(**changes) -> Path:
        return save_weights(tmp_path / "weights.safetensors", **changes)

    return make


def save(path: Path, data: np.ndarray, affine=OBLIQUE, units=("mm", "sec")) -> Path:
    path.parent.mkdir(exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units(*units)
    nib.save(image, path)
    return path


def noise(shape=(30, 36, 9), seed=0, kind=np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(kind)


def test_a_prediction_is_what_fine_tuning_scored(trained, tmp_path):
    weights, scores = trained
    for subject in set(scores.index.get_level_values("subject")):
        volume = phantom_volume(subject)
        save(tmp_path / "in" / f"{subject}.nii.gz", volume.image[0].T, volume.affine)
    assert predict(weights, tmp_path / "in", tmp_path / "out") == (2, 0)
    for (subject, name), expected in scores.items():
        found = np.asarray(nib.load(tmp_path / "out" / f"{subject}.nii.gz").dataobj).T
        value = {"right ventricle": 1, "myocardium": 2, "left ventricle": 3}[name]
        reference = phantom_volume(subject).label == value
        assert dice(found == value, reference) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert scores.max() > 0.1  # else a blank map would pass


@pytest.mark.parametrize("size", [[32, 32], [8, 32, 32]])
def test_a_label_map_lies_on_the_grid_of_its_image(size, weights, tmp_path):
    image = save(tmp_path / "scans" / "Häuser und Straßen.nii.gz", noise())
    before = files_of(image.parent)
    assert predict(weights(size=size), image, tmp_path / "new" / "out") == (1, 0)
    assert files_of(image.parent) == before
    given, found = nib.load(image), nib.load(tmp_path / "new" / "out" / image.name)
    assert found.shape == given.shape
    np.testing.assert_array_equal(found.affine, given.affine)
    assert found.header.get_xyzt_units() == ("mm", "sec")
    assert [int(found.header[f"{form}_code"]) for form in ("qform", "sform")] == [0, 2]
    assert found.get_data_dtype() == np.uint16
    assert set(np.unique(found.dataobj)) <= {0, 200, 500, 600}
    assert len(np.unique(found.dataobj)) > 1


def test_axes_that_are_stored_the_other_way_round_change_nothing(weights, tmp_path):
    """One scan of an axis-parallel grid, stored with every axis reversed: the same segmentation of the same points."""
    data, affine = noise(), np.diag([1.2, 1.2, 3.0, 1])
    turned = affine @ np.array([[-1, 0, 0, 29], [0, -1, 0, 35], [0, 0, -1, 8], [0, 0, 0, 1]])
    save(tmp_path / "in" / "a.nii.gz", data, affine)
    save(tmp_path / "in" / "b.nii", data[::-1, ::-1, ::-1], turned)
    predict(weights(), tmp_path / "in", tmp_path / "out", keep=True)
    a, b = (np.asarray(nib.load(tmp_path / "out" / f"{name}.nii.gz").dataobj) for name in "ab")
    np.testing.assert_array_equal(a, b[::-1, ::-1, ::-1])
    first, second = (np.load(tmp_path / "out" / f"{name}.npz")["probabilities"] for name in "ab")
    np.testing.assert_array_equal(first, second[:, ::-1, ::-1, ::-1])
    predict(weights(orient=False), tmp_path / "in", tmp_path / "as stored")
    a, b = (np.asarray(nib.load(tmp_path / "as stored" / f"{name}.nii.gz").dataobj) for name in "ab")
    assert (a != b[::-1, ::-1, ::-1]).any()


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 2, 1), (1, 2, 0), (2, 1, 0)])
def test_a_scan_stored_in_another_order_gets_the_same_mask_in_that_order(order, weights, tmp_path):
    """Cubic voxels, so that only the weights know along which axis the network has seen slices."""
    data, affine = noise((30, 36, 20)), np.diag([1.2, 1.2, 1.2, 1])
    save(tmp_path / "in" / "a.nii.gz", data, affine)
    save(tmp_path / "in" / "b.nii.gz", data.transpose(order), affine[:, [*order, 3]])
    predict(weights(slice_axis="z"), tmp_path / "in", tmp_path / "out", keep=True)
    a, b = (np.asarray(nib.load(tmp_path / "out" / f"{name}.nii.gz").dataobj) for name in "ab")
    assert len(np.unique(a)) > 1
    np.testing.assert_array_equal(b, a.transpose(order))
    first, second = (np.load(tmp_path / "out" / f"{name}.npz")["probabilities"] for name in "ab")
    np.testing.assert_array_equal(second, first.transpose(0, *(1 + axis for axis in order)))
    predict(weights(slice_axis="y"), tmp_path / "in" / "a.nii.gz", tmp_path / "other")
    assert (np.asarray(nib.load(tmp_path / "other" / "a.nii.gz").dataobj) != a).any()


@pytest.mark.parametrize(("plane", "tiles"), [((32, 48), 1), ((33, 48), 2), ((64, 48), 3), ((100, 120), 24)])
def test_a_field_larger_than_the_network_s_is_seen_whole(plane, tiles):
    """A network that sees one pixel at a time says of every pixel the same as if it saw the field at once."""
    torch.manual_seed(0)
    network, sizes = torch.nn.Conv2d(1, 3, 1).eval(), []
    network.register_forward_hook(lambda module, given, found: sizes.append(tuple(given[0].shape[2:])))
    images = np.random.default_rng(0).normal(size=(2, 1, *plane)).astype(np.float16)
    found = segment_field(network, images, [32, 48])
    assert sizes == [(32, 48)] * tiles
    torch.testing.assert_close(found, network(torch.from_numpy(images).float()).softmax(1))


@pytest.mark.parametrize("size", [[32, 32], [8, 32, 32]])
def test_an_organ_far_from_the_centre_is_segmented_as_in_a_narrow_field(size, weights, tmp_path):
    """A scan of 30 columns, and one of 120 of which they are the first; the network sees 32 of them."""
    data = noise((30, 36, 9), kind=np.float32)
    wide = np.tile(data, (4, 1, 1))  # the same intensities, so the same percentiles
    save(tmp_path / "in" / "narrow.nii.gz", data, np.diag([1.4, 1.4, 3, 1]))
    save(tmp_path / "in" / "wide.nii.gz", wide, np.diag([1.4, 1.4, 3, 1]))
    predict(weights(size=size), tmp_path / "in", tmp_path / "out")
    narrow, whole = (np.asarray(nib.load(tmp_path / "out" / f"{name}.nii.gz").dataobj) for name in ("narrow", "wide"))
    assert (narrow == whole[:30]).mean() > 0.6  # of what an untrained network says of noise; 0.25 by chance
    for part in np.split(whole, 4):
        assert (part != 0).any()


def test_the_mask_of_a_scan_that_was_replaced_is_made_again(weights, tmp_path):
    image, out = save(tmp_path / "in" / "a.nii.gz", noise()), tmp_path / "out"
    save(tmp_path / "in" / "b.nii.gz", noise(seed=1))
    assert predict(weights(), tmp_path / "in", out, keep=True) == (2, 0)
    before = files_of(out)
    os.utime(image, ns=(1, 1))  # copied anew, but the same
    assert predict(weights(), tmp_path / "in", out) == (2, 2)
    image.write_bytes((tmp_path / "in" / "b.nii.gz").read_bytes())
    assert predict(weights(), tmp_path / "in", out) == (2, 1)
    assert "a.npz" not in files_of(out)  # it was of the scan before
    assert files_of(out)["b.nii.gz"] == before["b.nii.gz"]
    a, b = (nib.load(out / f"{name}.nii.gz").get_fdata() for name in "ab")
    np.testing.assert_array_equal(a, b)
    assert predict(weights(), tmp_path / "in", out) == (2, 2)


def test_lengths_that_are_no_millimetres_are_refused(weights, tmp_path):
    image = save(tmp_path / "in" / "a.nii.gz", noise(), units=("micron", "sec"))
    with pytest.raises(RequestError, match=r"a.nii.gz: its header gives lengths in micron; .*set_xyzt_units"):
        predict(weights(), image, tmp_path / "out")


def test_lengths_of_a_pair_of_files_are_looked_at_too(weights, tmp_path):
    image = nib.Nifti1Pair(noise(), OBLIQUE)
    image.header.set_xyzt_units("meter", "sec")
    (tmp_path / "in").mkdir()
    nib.save(image, tmp_path / "in" / "a.hdr")
    with pytest.raises(RequestError, match=r"a.*: its header gives lengths in meter; .*set_xyzt_units"):
        predict(weights(), tmp_path / "in", tmp_path / "out")


def test_a_nifti_2_file_gets_a_mask(weights, tmp_path):
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti2Image(noise(), OBLIQUE), tmp_path / "in" / "a.nii.gz")
    assert predict(weights(), tmp_path / "in", tmp_path / "out") == (1, 0)
    assert isinstance(nib.load(tmp_path / "out" / "a.nii.gz"), nib.Nifti2Image)


def test_the_mask_of_another_folder_is_not_replaced(weights, tmp_path):
    for seed, site in enumerate("AB"):
        save(tmp_path / site / "scan.nii.gz", noise(seed=seed))
    assert predict(weights(), tmp_path / "A", tmp_path / "out") == (1, 0)
    before = files_of(tmp_path / "out")
    refused = pytest.raises(RequestError, match=r"has the mask of another scan, of .*A; choose another")
    with refused:
        predict(weights(), tmp_path / "B", tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    (tmp_path / "B" / "scan.nii.gz").rename(tmp_path / "B" / "other.nii.gz")
    assert predict(weights(), tmp_path / "B", tmp_path / "out") == (1, 0)
    save(tmp_path / "A" / "scan.nii.gz", noise(seed=3))  # each is of its own folder
    assert predict(weights(), tmp_path / "A", tmp_path / "out") == (1, 0)
    save(tmp_path / "B" / "scan.nii.gz", noise(seed=4))
    with refused:
        predict(weights(), tmp_path / "B", tmp_path / "out")


def test_a_run_is_found_by_its_whole_name_without_the_hash(tmp_path):
    for name in ("finetune-gd+lr-seed10-0123456789", "finetune-gd-seed1-aaaaaaaaaa", "finetune-gd-seed2-aaaaaaaaaa"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").touch()
    assert weights_of(tmp_path / "finetune-gd-seed1").parent.name == "finetune-gd-seed1-aaaaaaaaaa"
    assert weights_of(tmp_path / "finetune-gd-seed2-aaaaaaaaaa").parent.name == "finetune-gd-seed2-aaaaaaaaaa"
    for name in ("finetune-gd+lr-seed1", "finetune-gd-seed", "finetune-gd"):
        with pytest.raises(RequestError, match="0 runs have this name"):
            weights_of(tmp_path / name)


def test_a_photograph_that_its_camera_turned_is_told(weights, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    pixels = noise((40, 32, 3), kind=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.jpg", exif=exif)
    predict(weights(channels=3, photograph=True, resize=True, values=(0, 255)), tmp_path / "in", tmp_path / "out")
    assert "a.jpg: its camera's orientation turns it, and its mask is of the upright image" in capsys.readouterr().err
    assert Image.open(tmp_path / "out" / "a.png").size == (40, 32)  # the file: 32 x 40


def test_texts_of_a_header_are_left_behind(weights, tmp_path):
    image = nib.Nifti1Image(noise(), OBLIQUE)
    image.header["descrip"], image.header["aux_file"], image.header["db_name"] = b"Jane Doe", b"Jane", b"Doe"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe, 1970"))
    nib.save(image, tmp_path / "a.nii")
    assert b"Jane" in (tmp_path / "a.nii").read_bytes()
    predict(weights(), tmp_path / "a.nii", tmp_path / "out")
    stored = gzip.decompress((tmp_path / "out" / "a.nii.gz").read_bytes())
    assert b"Jane" not in stored
    assert b"Doe" not in stored


@pytest.mark.parametrize(("shape", "told"), [((30, 36, 9), 0), ((30, 36, 5), 1)])
def test_3_d_weights_say_that_a_volume_is_thinner_than_what_they_see(shape, told, weights, tmp_path, capsys):
    for name in "ab"[: 1 + told]:
        save(tmp_path / "in" / f"{name}.nii.gz", noise(shape, seed=ord(name)))
    predict(weights(size=[8, 32, 32]), tmp_path / "in", tmp_path / "out")
    said = capsys.readouterr().err
    assert said.count("note: ") == told
    assert ("a.nii.gz: has 5 slices and the weights see 8 at once" in said) == bool(told)
    assert ("2 such files" in said) == bool(told)


@pytest.mark.parametrize("ending", ["mgz", "mgh", "hdr", "NII.GZ"])
def test_volumes_of_other_endings_get_nifti_masks_on_their_grid(ending, weights, tmp_path):
    data, affine = noise(kind=np.float32), np.diag([-1.2, -1.2, 3, 1])
    save(tmp_path / "in" / "a.nii", data, affine)
    (tmp_path / "other").mkdir()
    kinds = {"mgz": nib.MGHImage, "mgh": nib.MGHImage, "hdr": nib.Nifti1Pair}
    if ending in kinds:
        nib.save(kinds[ending](data, affine), tmp_path / "other" / f"a.{ending}")
    else:
        (tmp_path / "other" / f"a.{ending}").write_bytes(gzip.compress((tmp_path / "in" / "a.nii").read_bytes()))
    for folder in ("in", "other"):
        assert predict(weights(), tmp_path / folder, tmp_path / "out" / folder) == (1, 0)
    first, second = (nib.load(tmp_path / "out" / folder / "a.nii.gz") for folder in ("in", "other"))
    np.testing.assert_array_equal(second.dataobj, first.dataobj)
    np.testing.assert_allclose(second.affine, first.affine, atol=1e-5)


def test_numbered_scans_of_one_channel_are_not_channels(weights, tmp_path):
    for number in range(3):
        save(tmp_path / "in" / f"patient_{number:04d}.nii.gz", noise(seed=number))
    save(tmp_path / "in" / "case_0000.nii.gz", noise(seed=7))  # as nnU-Net names the only channel
    assert predict(weights(), tmp_path / "in", tmp_path / "out") == (4, 0)
    made = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert made == {"case.nii.gz", *(f"patient_{number:04d}.nii.gz" for number in range(3))}


def test_probabilities_are_those_of_the_label_map(weights, tmp_path):
    image = save(tmp_path / "in" / "a.nii.gz", noise())
    predict(weights(), image, tmp_path / "out", keep=True)
    probability = np.load(tmp_path / "out" / "a.npz")["probabilities"]
    assert probability.dtype == np.float16
    assert probability.shape == (4, 30, 36, 9)
    np.testing.assert_allclose(probability.astype(float).sum(0), 1, atol=2e-3)
    label = np.asarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj)
    chosen = np.take_along_axis(probability, np.searchsorted([0, 200, 500, 600], label)[None], 0)[0]
    np.testing.assert_array_equal(chosen, probability.max(0))


def test_channels_come_from_one_file_each_or_from_a_4_d_file(weights, tmp_path):
    channels = [noise(seed=seed, kind=np.float32) for seed in (1, 2)]
    for number, data in enumerate(channels):
        save(tmp_path / "in" / f"a_{number:04d}.nii.gz", data)
    save(tmp_path / "in" / "b.nii.gz", np.stack(channels, axis=-1))
    two = weights(channels=2)
    assert predict(two, tmp_path / "in", tmp_path / "out") == (2, 0)
    a, b = (nib.load(tmp_path / "out" / f"{name}.nii.gz") for name in "ab")
    np.testing.assert_array_equal(a.dataobj, b.dataobj)
    assert b.shape == (30, 36, 9)
    assert predict(two, tmp_path / "in" / "a_0001.nii.gz", tmp_path / "one") == (1, 0)
    np.testing.assert_array_equal(nib.load(tmp_path / "one" / "a.nii.gz").dataobj, a.dataobj)
    with pytest.raises(RequestError, match=r"b\.nii\.gz: its 1 file.*channel.*the other 2 of 3 images are segmented"):
        predict(weights(), tmp_path / "in", tmp_path / "each")
    assert set(files_of(tmp_path / "each")) == {"a_0000.nii.gz", "a_0001.nii.gz", "prediction.json"}
    save(tmp_path / "single" / "b.nii.gz", channels[1])
    predict(weights(), tmp_path / "single", tmp_path / "of the single")
    predict(weights(channel=1), tmp_path / "in" / "b.nii.gz", tmp_path / "of the second")
    single, second = (nib.load(tmp_path / f"of the {name}" / "b.nii.gz") for name in ("single", "second"))
    np.testing.assert_array_equal(single.dataobj, second.dataobj)


def test_files_are_grouped_by_channel_numbers_only_where_they_are_such(weights, tmp_path):
    two = read_weights(weights(channels=2))[1]
    (tmp_path := tmp_path / "in").mkdir()
    names = ["a_0000.nii.gz", "a_0001.nii", "scan_2019.nii.gz", "scan_2020.nii.gz", "b_0001.nii", "c.nii", "._c.nii"]
    for name in [*names, "notes.txt", "d_0000_0000.nii"]:
        (tmp_path / name).touch()
    found = {case: [path.name for path in files] for case, files in cases(tmp_path, two).items()}
    assert found.pop("a") == names[:2]
    assert found.pop("d_0000") == ["d_0000_0000.nii"]
    assert found == {name.split(".")[0]: [name] for name in names[2:6]}
    (tmp_path / "c.nii.gz").touch()
    with pytest.raises(RequestError, match=r"c\.nii"):
        cases(tmp_path, two)


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_photographs_give_masks(channels, mode, weights, tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3)).astype(np.uint8)
    for ending in ("png", "jpg"):
        Image.fromarray(pixels).convert(mode).save(tmp_path / "in" / f"lesion {ending}.{ending}")
    photographs = {"channels": channels, "photograph": True, "values": [0, 255], "resize": True}
    assert predict(weights(**photographs), tmp_path / "in", tmp_path / "out", keep=True) == (2, 0)
    mask = Image.open(tmp_path / "out" / "lesion jpg.png")
    assert (mask.size, mask.mode) == ((56, 40), "L")
    assert set(np.unique(mask)) == {0, 255}
    probability = np.load(tmp_path / "out" / "lesion jpg.npz")["probabilities"]
    certain = probability[1] != probability[0]  # in float16
    np.testing.assert_array_equal((probability[1] > probability[0])[certain], (np.asarray(mask) == 255)[certain])
    assert certain.mean() > 0.99
    with pytest.raises(RequestError, match="NIfTI"):
        predict(weights(), tmp_path / "in", tmp_path / "other")


def test_what_is_done_is_not_done_again_and_nothing_else_is_overwritten(weights, tmp_path):
    for name in "ab":
        save(tmp_path / "in" / f"{name}.nii.gz", noise())
    file, out = weights(), tmp_path / "out"
    assert predict(file, tmp_path / "in" / "a.nii.gz", out) == (1, 0)
    before = files_of(out)
    assert predict(file, tmp_path / "in", out) == (2, 1)
    assert files_of(out)["a.nii.gz"] == before["a.nii.gz"]
    assert predict(file, tmp_path / "in", out, keep=True) == (2, 0)
    before = files_of(out)
    assert set(before) == {"a.nii.gz", "b.nii.gz", "a.npz", "b.npz", "prediction.json"}
    with pytest.raises(RequestError, match="not of these weights"):
        predict(weights(seed=1), tmp_path / "in", out)
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    assert predict(weights(), tmp_path / "elsewhere", out, keep=True) == (2, 2)  # the same images
    assert files_of(out) == before
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.nii.gz").write_bytes(b"by hand")
    with pytest.raises(RequestError, match="choose another"):
        predict(weights(), tmp_path / "elsewhere", tmp_path / "labels")
    assert (tmp_path / "labels" / "a.nii.gz").read_bytes() == b"by hand"
    with pytest.raises(RequestError, match="folder of the images"):
        predict(weights(), tmp_path / "elsewhere", tmp_path / "labels" / ".." / "elsewhere")


def test_a_wrong_image_ends_in_one_sentence_and_the_others_stay(weights, tmp_path, capsys):
    save(tmp_path / "in" / "a.nii.gz", noise())
    save(tmp_path / "in" / "b.nii.gz", np.full((30, 36, 9), np.nan, np.float32))
    words = ["predict", "--weights", str(weights()), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    save(tmp_path / "in" / "c.nii.gz", noise(seed=2))
    assert cli.main(words) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("clseg: "))
    assert "b.nii.gz" in line
    assert "the other 2 of 3 images are segmented" in line
    assert set(files_of(tmp_path / "out")) == {"a.nii.gz", "c.nii.gz", "prediction.json"}
    (tmp_path / "in" / "b.nii.gz").unlink()
    assert cli.main(words) == 0
    assert "2 segmented, 2 of them before, by " in capsys.readouterr().out


@pytest.mark.real_data
@pytest.mark.parametrize(("dataset", "dimensions"), [("hippocampus", 2), ("hippocampus", 3), ("ph2", 2)])
def test_real_images_get_the_prediction_that_was_scored(dataset, dimensions, data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    monkeypatch.setenv("CLSEG_DATA", str(data_root))
    fields = {"dataset": dataset, "profile": "smoke", "method": "random", "labelled": 4, "dimensions": dimensions}
    overrides = ["dataset.protocols.seeded.test=6", "finetune.steps=40"]
    run = runs.do(runs.finetune_run(FinetuneParameters(**fields, overrides=overrides)))
    scores = run.read("metrics").set_index(["subject", "class_name"])["dice"]
    about = read_dataset(dataset)
    references = {ref.subject: ref for ref in scan(about)}
    values = {name: value for value, name in class_names(about, data_root / about.folder).items()}
    for subject in sorted(scores.index.get_level_values("subject").unique())[:3]:
        ref = references[subject]
        assert predict(run.folder / "weights.safetensors", ref.images[0], tmp_path / "out") == (1, 0)
        made = next(path for path in (tmp_path / "out").iterdir() if path.name.startswith(subject))
        found, reference = (
            np.asarray(Image.open(path) if path.suffix == ".png" else nib.load(path).dataobj)
            for path in (made, ref.label)
        )
        for name, value in values.items():
            assert dice(found == value, reference == value) == pytest.approx(scores[subject, name], abs=1e-6)
    assert scores.max() > 0.2
