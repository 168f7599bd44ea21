"""A digital short-axis cardiac phantom: the data set that is always there.

Every volume is computed from its subject id alone: smooth closed curves and ellipsoids are painted one over the other,
averaged over the pixel and the slice thickness, and put through a crude model of an MR scanner.

It is a model. It can show that the code runs, and how a method works and fails. It cannot show how well a method would
do on patients: real anatomy is less smooth, disease is not five groups, readers err, images hold flow, motion and
banding, and this heart contracts in the plane only. No score on it is a clinical result, or comparable with one on
ACDC, whose classes it borrows.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d

from clseg.data.formats import Volume

VERSION = 1  # part of the key of the prepared store: raise it with every change of a voxel

ANGLES = 720  # samples of a contour around the heart
LUNG, FAT, BLOOD = 0.07, 1.05, 1.0  # signal relative to blood; that of muscle depends on the scanner


class Scanner(NamedTuple):
    """Typical values of one scanner; each volume's own lie around them."""

    unit: float  # stored value of blood
    muscle: float  # signal of muscle relative to blood
    gamma: float
    bias: float  # range of the logarithm of the receive field
    blur_mm: float
    noise: float  # standard deviation relative to blood
    pixel_mm: float
    slice_mm: float


SCANNERS = (
    Scanner(unit=310, muscle=0.32, gamma=1.00, bias=0.4, blur_mm=0.8, noise=0.030, pixel_mm=1.45, slice_mm=10),
    Scanner(unit=720, muscle=0.40, gamma=1.25, bias=0.8, blur_mm=0.6, noise=0.045, pixel_mm=1.55, slice_mm=8),
    Scanner(unit=1900, muscle=0.55, gamma=0.85, bias=0.5, blur_mm=1.3, noise=0.060, pixel_mm=1.70, slice_mm=9),
)


class Group(NamedTuple):
    """Typical heart of one group of patients, at the base and end-diastole."""

    lv_radius_mm: float
    wall_mm: float
    rv_depth_mm: float  # from the septum to the free wall
    contraction: float  # end-systolic by end-diastolic radius of the left ventricle
    septum: float = 0.0  # how much thicker the septum is
    flat: float = 0.0  # how far it is pressed into the left ventricle
    scar: float = 0.0  # how much thinner one wall segment is


GROUPS = (
    Group(23, 8, 24, 0.66),  # normal
    Group(26, 8, 23, 0.80, scar=0.5),  # infarcted
    Group(31, 7, 24, 0.88),  # dilated
    Group(20, 12.5, 21, 0.58, septum=0.5),  # hypertrophic
    Group(21, 8, 32, 0.70, flat=0.22),  # overloaded right ventricle
)


class Grid(NamedTuple):
    """Where the samples lie, in mm from the middle of the heart: two sub-slices per slice, one sample per pixel."""

    x_mm: np.ndarray  # float32 [2Z, Y, X], bent by a smooth random field, as is y_mm
    y_mm: np.ndarray  # float32 [2Z, Y, X], downwards
    z_mm: np.ndarray  # float32 [2Z, 1, 1], from the base
    columns_mm: np.ndarray  # float32 [X], not bent
    rows_mm: np.ndarray  # float32 [Y]
    slice_mm: float
    pixel_mm: float

    def window(self, x_mm: float, y_mm: float, reach_mm: float) -> tuple[slice, slice, slice]:
        """Index of the samples within reach of a point, with room for the bending."""
        reach = np.array([-12.0 - reach_mm, 12.0 + reach_mm])
        rows, columns = np.searchsorted(self.rows_mm, y_mm + reach), np.searchsorted(self.columns_mm, x_mm + reach)
        return slice(None), slice(*rows), slice(*columns)

    def cover(self, outside_mm: np.ndarray) -> np.ndarray:
        """Part of each pixel that a region fills, 0 to 1, from the distance to the region's edge, negative inside."""
        return np.clip(0.5 - outside_mm / self.pixel_mm, 0, 1)


def phantom_volume(subject: str, phase: str = "ED") -> Volume:
    """Compute a subject's phantom: image float32 [1, Z, Y, X] in whole scanner units, label uint8 [Z, Y, X].

    Classes as in ACDC: 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle with its papillary muscles.
    Z is 8 to 12. Slice 0 is the base, where the outflow tract opens the ring of muscle; the last is the apex, without a
    right ventricle. One id gives one volume in every process; its phases share anatomy and scanner, not the noise.

    Raises: ValueError if the phase is neither "ED" nor "ES".
    """
    if phase not in ("ED", "ES"):
        raise ValueError(f"phase must be 'ED' or 'ES', not {phase!r}")
    rng = _generator(subject)
    scanner = SCANNERS[int(rng.random() * len(SCANNERS))]
    muscle = scanner.muscle * rng.uniform(0.85, 1.2)
    grid = _grid(rng, scanner)
    shape = grid.x_mm.shape
    texture = sum(0.8 * _smooth_field(rng, shape, (shape[0] // 2, knots, knots)) for knots in (24, 60))  # [2Z, Y, X]
    signal = _body(rng, grid, muscle, texture)
    label = np.zeros((shape[0] // 2, *shape[1:]), np.uint8)
    _heart(rng, grid, muscle, texture, signal, label, phase)
    signal = _slice_mean(signal * (1 + 0.1 * texture))
    image = _scan(rng, _generator(f"{subject} {phase}"), grid, scanner, signal)
    affine = np.diag([grid.pixel_mm, grid.pixel_mm, grid.slice_mm, 1.0])
    return Volume(image[None], label, (grid.slice_mm, grid.pixel_mm, grid.pixel_mm), subject, phase, affine)


def _generator(text: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")))


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], knots: tuple[int, ...]) -> np.ndarray:
    """Normal values on a lattice of 3-D knots, interpolated smoothly: float32 of the given 3-D shape."""
    weights = []
    for size, count in zip(shape, knots, strict=True):
        place = np.linspace(0, count - 1, size, dtype=np.float32)[:, None]
        near = np.clip(1 - np.abs(place - np.arange(count, dtype=np.float32)), 0, 1)  # [size, count]
        weights.append(near * near * (3 - 2 * near))
    field = np.tensordot(weights[0], rng.standard_normal(knots, dtype=np.float32), 1)  # [2Z, knots, knots]
    return weights[1] @ field @ weights[2].T  # [2Z, Y, X]


def _grid(rng: np.random.Generator, scanner: Scanner) -> Grid:
    """Draw the matrix size, the spacing, the number of slices and where the heart lies in the image."""
    pixel_mm = round(float(np.clip(scanner.pixel_mm + rng.uniform(-0.12, 0.12), 1.4, 1.8)), 4)
    slice_mm = round(float(np.clip(scanner.slice_mm + rng.uniform(-0.5, 0.5), 8, 10)), 1)
    slices = int(np.clip(round(rng.uniform(80, 106) / slice_mm), 8, 12))
    shape = (2 * slices, 128 + 8 * int(rng.random() * 3), 128 + 8 * int(rng.random() * 5))
    rows_mm, columns_mm = (
        (pixel_mm * (np.arange(size) - (size - 1) / 2) - rng.uniform(-14, 14)).astype(np.float32) for size in shape[1:]
    )
    x_mm = columns_mm + 4 * _smooth_field(rng, shape, (2, 6, 6))
    y_mm = rows_mm[:, None] + 4 * _smooth_field(rng, shape, (2, 6, 6))
    z_mm = (np.arange(2 * slices, dtype=np.float32)[:, None, None] + 0.5) * slice_mm / 2
    return Grid(x_mm, y_mm, z_mm, columns_mm, rows_mm, slice_mm, pixel_mm)


def _paint(signal: np.ndarray, cover: np.ndarray, value: np.ndarray | float) -> None:
    signal += cover * (value - signal)


def _turn(x_mm: np.ndarray, y_mm: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x_mm * cos + y_mm * sin, y_mm * cos - x_mm * sin


def _body(rng: np.random.Generator, grid: Grid, muscle: float, texture: np.ndarray) -> np.ndarray:
    """Signal [2Z, Y, X] of all but the heart: chest wall, lung, vessels, and what lies below the diaphragm."""
    shape = texture.shape
    s = grid.z_mm / (shape[0] // 2 * grid.slice_mm)  # [2Z, 1, 1] 0 base, 1 apex
    middle_mm, axes_mm = rng.uniform((-2, -25), (20, 20)), rng.uniform((104, 122), (120, 145))
    x_mm, y_mm = _turn(grid.x_mm - middle_mm[0], grid.y_mm - middle_mm[1], rng.uniform(-0.3, 0.3))
    deep_mm = (1 - np.hypot(x_mm / (axes_mm[0] * (1 - rng.uniform(0, 0.15) * s)), y_mm / axes_mm[1])) * axes_mm.min()
    fat = FAT * rng.uniform(0.8, 1.25)
    skin_mm = rng.uniform(5, 18) * (1 + 0.3 * _smooth_field(rng, shape, (2, 5, 5)))  # skin and the fat below it
    ribs = np.sin(grid.y_mm * (2 * np.pi / rng.uniform(24, 32)) + rng.uniform(0, 6))
    signal = fat * grid.cover(-deep_mm)
    _paint(signal, grid.cover(skin_mm - deep_mm), muscle * rng.uniform(0.8, 1.1) + 0.3 * np.clip(ribs - 0.4, 0, 1))
    inner = grid.cover(skin_mm + rng.uniform(9, 16) - deep_mm)
    _paint(signal, inner, LUNG + 0.5 * np.clip(texture - 1.5, 0, 1))  # lung and its small vessels
    diaphragm_mm = rng.uniform(12, 34) - rng.uniform(8, 28) * s + rng.uniform(-0.35, 0.25) * grid.x_mm
    diaphragm_mm = diaphragm_mm + 0.003 * (grid.x_mm - rng.uniform(-40, 40)) ** 2
    below = inner * grid.cover(diaphragm_mm - grid.y_mm)
    _paint(signal, below, fat * rng.uniform(0.7, 1.0) * (1 + 0.2 * texture))

    def ellipsoid(centre_mm, axes_mm, angle, within, value):
        window = grid.window(*centre_mm[:2], max(axes_mm[:2]))
        x_mm, y_mm = _turn(grid.x_mm[window] - centre_mm[0], grid.y_mm[window] - centre_mm[1], angle)
        squares = ((x_mm / axes_mm[0]) ** 2, (y_mm / axes_mm[1]) ** 2, ((grid.z_mm - centre_mm[2]) / axes_mm[2]) ** 2)
        cover = grid.cover((np.sqrt(sum(squares)) - 1) * min(axes_mm[:2]))
        _paint(signal[window], cover * within[window], value * (1 + 0.1 * texture[window]))

    liver, spleen = muscle * rng.uniform(0.8, 1.3), muscle * rng.uniform(0.9, 1.7)
    shift_mm = rng.uniform(-16, 16, 3)
    for centre_mm, axes_mm, value in (
        ((-45, 70, 35), (68, 45, 75), liver),
        ((20, 95, 60), (38, 26, 60), liver),
        ((75, 60, 60), (26, 38, 55), spleen),
        ((0, 107, 20), (15, 24, 40), spleen),  # a kidney
    ):
        centre_mm, axes_mm = centre_mm + shift_mm + rng.uniform(-14, 14, 3), axes_mm * rng.uniform(0.75, 1.25, 3)
        ellipsoid(centre_mm, axes_mm, rng.uniform(-0.6, 0.6), below, value)
    for low_mm, high_mm, bore_mm, reach_mm in (  # round, walled and bright: what can be taken for a ventricle
        ((20, 42, 50), (55, 70, 90), (12, 19), (40, 50)),  # stomach
        ((20, 35, 0), (55, 60, 60), (9, 14), (400, 400)),  # descending aorta
        ((-50, 40, 0), (-10, 60, 60), (6, 11), (60, 60)),  # caval vein
        ((-35, -60, -20), (35, -42, 0), (8, 13), (25, 45)),  # pulmonary artery
        ((40, -40, -20), (70, 20, 10), (5, 11), (20, 60)),  # pulmonary vein
        ((0, 18, -15), (35, 38, -5), (14, 24), (15, 35)),  # left atrium
        ((-45, 15, -15), (-15, 38, -5), (12, 22), (15, 30)),  # right atrium
        ((-60, -60, 30), (60, 60, 90), (4, 9), (15, 40)),  # any vessel
    ):
        centre_mm, bore_mm = rng.uniform(low_mm, high_mm), rng.uniform(*bore_mm) * rng.uniform(0.85, 1.2, 2)
        wall_mm, reach_mm = rng.uniform(1.5, 4), rng.uniform(*reach_mm)
        ellipsoid(centre_mm, (*(bore_mm + wall_mm), reach_mm), 0, inner, muscle)
        ellipsoid(centre_mm, (*bore_mm, reach_mm), 0, inner, BLOOD * rng.uniform(0.7, 1.15))
    return signal


def _heart(
    rng: np.random.Generator,
    grid: Grid,
    muscle: float,
    texture: np.ndarray,
    signal: np.ndarray,
    label: np.ndarray,
    phase: str,
) -> None:
    """Paint the heart into signal and label; contours are radii [2Z, ANGLES] around the axis of the left ventricle."""
    slices = len(label)
    s = np.float64(grid.z_mm[:, :, 0]) / (slices * grid.slice_mm)  # [2Z, 1] 0 base, 1 apex
    phi = 2 * np.pi * np.arange(ANGLES) / ANGLES  # [ANGLES] 0 the lateral wall, pi/2 the anterior one, pi the septum

    def near(angle, width):  # [ANGLES] 1 at the angle, 0 far from it
        return np.exp(-(((np.mod(phi - angle + np.pi, 2 * np.pi) - np.pi) / width) ** 2))

    group = GROUPS[int(rng.random() * len(GROUPS))]
    size = rng.uniform(0.86, 1.14)
    lv_mm = group.lv_radius_mm * size * rng.uniform(0.93, 1.07)
    lv_mm = lv_mm * (1 - (rng.uniform(0.88, 0.97) * s) ** rng.uniform(1.8, 2.8)) ** 0.55
    for order, most in ((2, 0.12), (3, 0.05), (4, 0.03)):
        lv_mm = lv_mm * (1 + rng.uniform(0, most) * np.cos(order * (phi - rng.uniform(0, 7) - rng.uniform(-1, 1) * s)))
    lv_mm = lv_mm * (1 - group.flat * rng.uniform(0.6, 1.2) * near(np.pi, 0.8))
    wall_mm = group.wall_mm * rng.uniform(0.85, 1.15) * (1 - rng.uniform(0.1, 0.35) * s)
    wall_mm = wall_mm * (1 + group.septum * rng.uniform(0.5, 1.2) * near(np.pi + rng.uniform(-0.5, 0.5), 0.8))
    scar = group.scar * rng.uniform(0.6, 1.1) * near(rng.uniform(0, 7), 0.6)
    wall_mm = wall_mm * (1 - scar * np.exp(-(((s - rng.uniform(0.3, 0.8)) / 0.3) ** 2)))
    epi_mm = lv_mm + np.maximum(wall_mm, 4)
    rv_mm = group.rv_depth_mm * size * rng.uniform(0.8, 1.2)
    contraction = group.contraction * rng.uniform(0.94, 1.06)
    if phase == "ES":  # the muscle keeps its area
        epi_mm = np.sqrt((lv_mm * contraction) ** 2 + epi_mm**2 - lv_mm**2)
        lv_mm, rv_mm = lv_mm * contraction, rv_mm * (1 + contraction) / 2
    turn = np.abs(phi - np.pi + rng.uniform(-0.15, 0.15)) / (rng.uniform(1.15, 1.6) * (1 - 0.3 * s))
    crescent = np.clip(1 - turn**2.5, 0, 1) ** rng.uniform(0.55, 0.9)
    bulge = 1 + rng.uniform(0, 0.5) * near(2.2, 0.5) * (1 - s)  # towards the pulmonary artery
    rv_mm = rv_mm * np.clip(1 - (s / rng.uniform(0.68, 0.88)) ** rng.uniform(1.5, 3), 0, 1) ** 0.6
    rv_mm = rv_mm * (rv_mm.reshape(slices, 2).mean(1).repeat(2)[:, None] > 6)  # it ends before it is too thin to see
    rv_mm = epi_mm + rv_mm * crescent * bulge - 2
    coat_mm = np.maximum(epi_mm, rv_mm + 2.5)  # where the fat around the heart begins
    fat_mm = coat_mm + rng.uniform(1, 10) * near(rng.uniform(0.5, 2.4), 0.6)
    fat_mm = fat_mm + rng.uniform(1, 12) * near(rng.uniform(3.6, 5.4), 0.6)

    window = grid.window(0, 0, fat_mm.max() + 12)
    axis_mm = rng.uniform(-20, 20, 2) * (s - 0.5) + rng.uniform(-1.5, 1.5, (slices, 2)).repeat(2, 0)  # tilt, breath
    axis_mm = np.float32(axis_mm)[:, :, None, None]  # [2Z, 2, 1, 1]
    x_mm, y_mm = _turn(grid.x_mm[window] - axis_mm[:, 0], grid.y_mm[window] - axis_mm[:, 1], rng.uniform(-0.5, 0.5))
    gate = (near(rng.uniform(1.9, 2.5), rng.uniform(0.4, 0.65)) > 0.4) * (s < 1 / slices)  # open in slice 0

    def around(contour, angle):  # [n, ANGLES] to [n, y, x]
        index = (angle * np.float32(ANGLES / (2 * np.pi)) + 2 * ANGLES).astype(np.int32) % ANGLES
        return np.float32(contour).ravel()[index + ANGLES * np.arange(len(contour), dtype=np.int32)[:, None, None]]

    # the reader draws one closed contour per slice
    r_mm, angle = np.hypot(_slice_mean(x_mm), _slice_mean(y_mm)), np.arctan2(-_slice_mean(y_mm), _slice_mean(x_mm))
    in_lv, in_epi, in_rv = (
        r_mm < around(contour.reshape(slices, 2, ANGLES).mean(1), angle) for contour in (lv_mm, epi_mm, rv_mm)
    )
    label[window] = np.select([in_lv, in_epi & (around(gate[::2], angle) > 0), in_epi, in_rv], [3, 0, 2, 1], 0)

    r_mm, angle = np.hypot(x_mm, y_mm), np.arctan2(-y_mm, x_mm)
    lv_edge_mm, epi_edge_mm = around(lv_mm, angle), around(epi_mm, angle)
    canvas, grain = signal[window], texture[window]
    muscle = muscle * rng.uniform(0.85, 1.15)
    rough = rng.uniform(0.1, 0.4)  # trabeculae: muscle among the blood
    _paint(canvas, grid.cover(r_mm - around(fat_mm, angle)), FAT * rng.uniform(0.75, 1.2))
    _paint(canvas, grid.cover(r_mm - around(coat_mm, angle)), muscle)
    rv = grid.cover(r_mm - around(rv_mm, angle)) * (1 - grid.cover(r_mm - epi_edge_mm))
    _paint(canvas, rv, BLOOD * rng.uniform(0.8, 1.1) * (1 - rough * np.clip(grain, 0, 1)))
    outflow = grid.cover(r_mm - epi_edge_mm + 1.5) * around(gate, angle)  # blood, yet background to the reader
    _paint(canvas, outflow, BLOOD)
    edge = np.clip(4 * r_mm / lv_edge_mm - 3, 0, 1)  # 1 at the wall
    lv = grid.cover(r_mm - lv_edge_mm)
    _paint(canvas, lv, BLOOD * (1 - rough * edge * np.clip(grain + 1, 0, 2)))
    for place in rng.uniform((0.7, 4.6), (1.3, 5.4)):  # papillary muscles
        body_mm = rng.uniform(0.16, 0.28) * lv_mm.mean(1) * np.exp(-(((s[:, 0] - rng.uniform(0.45, 0.6)) / 0.25) ** 2))
        arm_mm = np.float32(rng.uniform(0.55, 0.75) * lv_mm[:, int(place / (2 * np.pi) * ANGLES)])[:, None, None]
        apart_mm = np.sqrt(r_mm**2 + arm_mm**2 - 2 * r_mm * arm_mm * np.cos(angle - np.float32(place)))
        _paint(canvas, lv * grid.cover(apart_mm - np.float32(body_mm)[:, None, None]), muscle)


def _slice_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the two halves of every slice: [..., 2Z, Y, X] to [..., Z, Y, X]."""
    return (values[..., 0::2, :, :] + values[..., 1::2, :, :]) / 2


def _scan(
    rng: np.random.Generator, noise: np.random.Generator, grid: Grid, scanner: Scanner, signal: np.ndarray
) -> np.ndarray:
    """Blur, receive field, gamma, Rician noise and the scanner's unit: float32 [Z, Y, X] of whole numbers."""
    blur_px = scanner.blur_mm * rng.uniform(0.8, 1.2) / grid.pixel_mm
    signal = gaussian_filter1d(gaussian_filter1d(signal, blur_px, 1), blur_px, 2)
    slope = scanner.bias / 250 * rng.uniform(-1, 0.4, 2)  # most coils lie on the chest, above and left of the heart
    field = slope[0] * grid.columns_mm + slope[1] * grid.rows_mm[:, None]
    field = field + 0.3 * scanner.bias * _smooth_field(rng, signal.shape, (2, 4, 4))
    signal = np.clip(signal * np.exp(field), 0, None) ** (scanner.gamma * rng.uniform(0.9, 1.1))
    level = scanner.noise * rng.uniform(0.7, 1.4)
    real, imaginary = level * noise.standard_normal((2, *signal.shape), dtype=np.float32)
    image = np.hypot(signal + real, imaginary) * scanner.unit * rng.uniform(0.7, 1.4)
    return np.rint(image).astype(np.float32)  # as scanners store it; and processors differ in the last bits
