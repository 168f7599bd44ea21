"""A digital short-axis cardiac phantom: the data set that is always there, each volume computed from its subject id.

Smooth curves and ellipsoids, painted one over the other, seen by a crude model of an MR scanner: it shows that the code
runs, and how a method works and fails, not how well one would do on patients: real anatomy is less smooth, disease is
not five groups, readers err, images hold flow, motion and banding, and this heart contracts in the plane only. No score
on it is a clinical result, or comparable with one on ACDC, whose classes it borrows.
"""

import hashlib

import numpy as np
from scipy.ndimage import gaussian_filter

from clseg.data.volume import Volume
from clseg.settings import DatasetConfig

VERSION = 1  # part of the key of the prepared store: raise it with every change of a voxel
ANGLES = 720  # samples of a contour around the heart
LUNG, FAT, BLOOD = 0.07, 1.05, 1.0  # signal relative to blood; that of muscle depends on the scanner


def phantom_dataset(subjects: int = 44) -> DatasetConfig:
    """The description of a data set of so many phantom subjects, as `prepare` takes it."""
    classes = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    about = {"name": "phantom", "adapter": "phantom", "options": {"subjects": subjects}}
    return DatasetConfig(**about, classes=classes, phases=["ED"], threshold=0.35)


def phantom_volume(subject: str, phase: str = "ED") -> Volume:
    """Compute a subject's phantom: image float32 [1, Z, Y, X] in whole scanner units, label uint8 [Z, Y, X].

    Classes as in ACDC: 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle with its papillary muscles. 8 to
    12 slices from the base, where the outflow tract opens the ring of muscle, to the apex, which has no class 1. One id
    gives one volume in every process; its phases ("ED", "ES", else `ValueError`) share anatomy and scanner, not noise.
    """
    if phase not in ("ED", "ES"):
        raise ValueError(f"phase must be 'ED' or 'ES', not {phase!r}")
    seeds = (hashlib.sha256(text.encode()).digest()[:8] for text in (subject, f"{subject} {phase}"))
    rng, noise_rng = (np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little"))) for seed in seeds)
    draw = rng.uniform
    scanner = int(draw(0, 3))  # its typical values are listed where they count; those of the volume lie around them
    muscle = (0.32, 0.40, 0.55)[scanner] * draw(0.85, 1.2)  # signal relative to blood
    canvas = _Canvas(rng, (1.45, 1.55, 1.70)[scanner], (10, 8, 9)[scanner])
    _paint_body(canvas, muscle)
    label = _paint_heart(canvas, muscle, phase)
    blur_px = (0.8, 0.6, 1.3)[scanner] * draw(0.8, 1.2) / canvas.pixel_mm
    signal = gaussian_filter(_slice_mean(canvas.signal * (1 + 0.1 * canvas.texture)), (0, blur_px, blur_px))
    bias = (0.4, 0.8, 0.5)[scanner]  # range of the logarithm of the receive field
    slope = bias / 250 * draw(-1, 0.4, 2)  # most coils lie on the chest, above and left of the heart
    coils = slope[0] * canvas.columns_mm + slope[1] * canvas.rows_mm[:, None]
    gain = np.exp(coils + 0.3 * bias * canvas.smooth_field((2, 4, 4), signal.shape))
    signal = np.clip(signal * gain, 0, None) ** ((1.00, 1.25, 0.85)[scanner] * draw(0.9, 1.1))
    noise = (0.030, 0.045, 0.060)[scanner] * draw(0.7, 1.4) * noise_rng.standard_normal((2, *signal.shape), np.float32)
    image = np.hypot(signal + noise[0], noise[1]) * (310, 720, 1900)[scanner] * draw(0.7, 1.4)  # Rician; stored unit
    image = np.rint(image).astype(np.float32)  # as scanners store it; and processors differ in the last bits
    spacing_mm = (canvas.slice_mm, canvas.pixel_mm, canvas.pixel_mm)
    return Volume(image[None], label, spacing_mm, subject, phase, np.diag([*spacing_mm[::-1], 1.0]))


def _slice_mean(values: np.ndarray) -> np.ndarray:
    return (values[0::2] + values[1::2]) / 2  # [2Z, ...] to [Z, ...]


class _Canvas:
    """The signal of two sub-slices per slice, [2Z, Y, X], and where it lies, in mm from the middle of the heart."""

    def __init__(self, rng: np.random.Generator, pixel_mm: float, slice_mm: float):
        self.rng, draw = rng, rng.uniform
        self.pixel_mm = round(float(np.clip(pixel_mm + draw(-0.12, 0.12), 1.4, 1.8)), 4)
        self.slice_mm = round(float(np.clip(slice_mm + draw(-0.5, 0.5), 8, 10)), 1)
        self.slices = int(np.clip(round(draw(80, 106) / self.slice_mm), 8, 12))
        self.shape = (2 * self.slices, 128 + 8 * int(draw(0, 3)), 128 + 8 * int(draw(0, 5)))
        lines_mm = (self.pixel_mm * (np.arange(n) - (n - 1) / 2) - draw(-14, 14) for n in self.shape[1:])
        self.rows_mm, self.columns_mm = map(np.float32, lines_mm)  # [Y] downwards, [X]
        self.x_mm = self.columns_mm + 4 * self.smooth_field((2, 6, 6))  # [2Z, Y, X], bent, as is y_mm
        self.y_mm = self.rows_mm[:, None] + 4 * self.smooth_field((2, 6, 6))
        self.z_mm = (np.arange(2 * self.slices, dtype=np.float32)[:, None, None] + 0.5) * self.slice_mm / 2  # from base
        self.texture = sum(0.8 * self.smooth_field((self.slices, knots, knots)) for knots in (24, 60))
        self.signal = np.zeros(self.shape)

    def smooth_field(self, knots: tuple[int, ...], shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Normal values on a lattice of knots, interpolated smoothly over the canvas or another shape: float32."""
        weights = []
        for size, count in zip(shape or self.shape, knots, strict=True):
            place = np.linspace(0, count - 1, size, dtype=np.float32)[:, None]
            near = np.clip(1 - np.abs(place - np.arange(count, dtype=np.float32)), 0, 1)
            weights.append(near * near * (3 - 2 * near))
        return weights[1] @ np.tensordot(weights[0], self.rng.standard_normal(knots, np.float32), 1) @ weights[2].T

    def turned(self, x_mm, y_mm, angle, window=...) -> tuple[np.ndarray, np.ndarray]:  # x, y as seen from a point
        x_mm, y_mm = self.x_mm[window] - x_mm, self.y_mm[window] - y_mm
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return x_mm * cos + y_mm * sin, y_mm * cos - x_mm * sin

    def cover(self, outside_mm: np.ndarray) -> np.ndarray:
        """Part of each pixel that a region fills, 0 to 1, by the distance to the region's edge, negative inside."""
        return np.clip(0.5 - outside_mm / self.pixel_mm, 0, 1)

    def paint(self, outside_mm: np.ndarray, value, within=1, window=...) -> np.ndarray:
        """Give a signal to the part of a region that lies within another, and return its cover."""
        cover = self.cover(outside_mm) * within
        self.signal[window] += cover * (value - self.signal[window])
        return cover

    def paint_ellipsoid(self, centre_mm, axes_mm, angle: float, value: float, within: np.ndarray) -> None:
        reach_mm = (max(axes_mm[:2]) + 12) * np.array([-1, 1])  # with room for the bending
        rows = slice(*np.searchsorted(self.rows_mm, centre_mm[1] + reach_mm))
        window = np.s_[:, rows, slice(*np.searchsorted(self.columns_mm, centre_mm[0] + reach_mm))]
        offset_mm = (*self.turned(*centre_mm[:2], angle, window), self.z_mm - centre_mm[2])
        radius = np.sqrt(sum((offset / axis) ** 2 for offset, axis in zip(offset_mm, axes_mm, strict=True)))
        self.paint((radius - 1) * min(axes_mm[:2]), value * (1 + 0.1 * self.texture[window]), within[window], window)


def _paint_body(canvas: _Canvas, muscle: float) -> None:
    """Paint all but the heart: chest wall, lung, vessels, and what lies below the diaphragm."""
    draw, paint, texture, x_mm = canvas.rng.uniform, canvas.paint, canvas.texture, canvas.x_mm
    s = canvas.z_mm / (canvas.slices * canvas.slice_mm)  # [2Z, 1, 1] 0 base, 1 apex
    middle_mm, axes_mm = draw((-2, -25), (20, 20)), draw((104, 122), (120, 145))
    u_mm, v_mm = canvas.turned(*middle_mm, draw(-0.3, 0.3))
    deep_mm = (1 - np.hypot(u_mm / (axes_mm[0] * (1 - draw(0, 0.15) * s)), v_mm / axes_mm[1])) * axes_mm.min()
    fat, skin_mm = FAT * draw(0.8, 1.25), draw(5, 18) * (1 + 0.3 * canvas.smooth_field((2, 5, 5)))
    ribs = np.clip(np.sin(canvas.y_mm * (2 * np.pi / draw(24, 32)) + draw(0, 6)) - 0.4, 0, 1)
    paint(-deep_mm, fat)
    paint(skin_mm - deep_mm, muscle * draw(0.8, 1.1) + 0.3 * ribs)
    inner = paint(skin_mm + draw(9, 16) - deep_mm, LUNG + 0.5 * np.clip(texture - 1.5, 0, 1))  # with small vessels
    diaphragm_mm = draw(12, 34) - draw(8, 28) * s + draw(-0.35, 0.25) * x_mm + 0.003 * (x_mm - draw(-40, 40)) ** 2
    below = paint(diaphragm_mm - canvas.y_mm, fat * draw(0.7, 1.0) * (1 + 0.2 * texture), inner)
    liver, spleen, shift_mm = muscle * draw(0.8, 1.3), muscle * draw(0.9, 1.7), draw(-16, 16, 3)
    centres_mm = ((-45, 70, 35), (20, 95, 60), (75, 60, 60), (0, 107, 20))  # liver, its left lobe, spleen, a kidney
    sizes_mm = ((68, 45, 75), (38, 26, 60), (26, 38, 55), (15, 24, 40))
    for centre_mm, axes_mm, value in zip(centres_mm, sizes_mm, (liver, liver, spleen, spleen), strict=True):
        centre_mm, axes_mm = centre_mm + shift_mm + draw(-14, 14, 3), axes_mm * draw(0.75, 1.25, 3)
        canvas.paint_ellipsoid(centre_mm, axes_mm, draw(-0.6, 0.6), value, below)
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
        centre_mm, bore_mm = draw(low_mm, high_mm), draw(*bore_mm) * draw(0.85, 1.2, 2)
        wall_mm, reach_mm = draw(1.5, 4), draw(*reach_mm)
        canvas.paint_ellipsoid(centre_mm, (*(bore_mm + wall_mm), reach_mm), 0, muscle, inner)
        canvas.paint_ellipsoid(centre_mm, (*bore_mm, reach_mm), 0, BLOOD * draw(0.7, 1.15), inner)


def _paint_heart(canvas: _Canvas, muscle: float, phase: str) -> np.ndarray:
    """Paint the heart and return its label; contours are radii [2Z, ANGLES] around the axis of the left ventricle."""
    draw, paint, texture = canvas.rng.uniform, canvas.paint, canvas.texture
    s = np.float64(canvas.z_mm[:, :, 0]) / (canvas.slices * canvas.slice_mm)  # [2Z, 1] 0 base, 1 apex
    phi = 2 * np.pi * np.arange(ANGLES) / ANGLES  # 0 the lateral wall, pi/2 the anterior one, pi the septum

    def near(angle, width):  # [ANGLES] 1 at the angle, 0 far from it
        return np.exp(-(((np.mod(phi - angle + np.pi, 2 * np.pi) - np.pi) / width) ** 2))

    def around(contour, angle):  # [n, ANGLES] to [n, Y, X]
        index = (angle * np.float32(ANGLES / (2 * np.pi)) + 2 * ANGLES).astype(np.int32) % ANGLES
        return np.take_along_axis(np.float32(contour)[:, None], index, 2)

    group, size = int(draw(0, 5)), draw(0.86, 1.14)  # normal, infarcted, dilated, hypertrophic, right side overloaded
    lv_mm = (23, 26, 31, 20, 21)[group] * size * draw(0.93, 1.07)
    lv_mm = lv_mm * (1 - (draw(0.88, 0.97) * s) ** draw(1.8, 2.8)) ** 0.55
    for order, most in ((2, 0.12), (3, 0.05), (4, 0.03)):
        lv_mm = lv_mm * (1 + draw(0, most) * np.cos(order * (phi - draw(0, 7) - draw(-1, 1) * s)))
    lv_mm = lv_mm * (1 - (0, 0, 0, 0, 0.22)[group] * draw(0.6, 1.2) * near(np.pi, 0.8))  # flattens the septum
    wall_mm = (8, 8, 7, 12.5, 8)[group] * draw(0.85, 1.15) * (1 - draw(0.1, 0.35) * s)
    thicker = (0, 0, 0, 0.5, 0)[group] * draw(0.5, 1.2) * near(np.pi + draw(-0.5, 0.5), 0.8)  # of the septum
    thinner = (0, 0.5, 0, 0, 0)[group] * draw(0.6, 1.1) * near(draw(0, 7), 0.6)
    thinner = thinner * np.exp(-(((s - draw(0.3, 0.8)) / 0.3) ** 2))  # at the scar
    epi_mm = lv_mm + np.maximum(wall_mm * (1 + thicker) * (1 - thinner), 4)
    rv_mm = (24, 23, 24, 21, 32)[group] * size * draw(0.8, 1.2)  # from the septum to the free wall
    contraction = (0.66, 0.80, 0.88, 0.58, 0.70)[group] * draw(0.94, 1.06)
    if phase == "ES":  # the muscle keeps its area
        epi_mm = np.sqrt((lv_mm * contraction) ** 2 + epi_mm**2 - lv_mm**2)
        lv_mm, rv_mm = lv_mm * contraction, rv_mm * (1 + contraction) / 2
    turn = np.abs(phi - np.pi + draw(-0.15, 0.15)) / (draw(1.15, 1.6) * (1 - 0.3 * s))
    crescent = np.clip(1 - turn**2.5, 0, 1) ** draw(0.55, 0.9)
    bulge = 1 + draw(0, 0.5) * near(2.2, 0.5) * (1 - s)  # towards the pulmonary artery
    rv_mm = rv_mm * np.clip(1 - (s / draw(0.68, 0.88)) ** draw(1.5, 3), 0, 1) ** 0.6
    rv_mm = rv_mm * (_slice_mean(rv_mm).repeat(2, 0) > 6)  # it ends before it is too thin to see
    rv_mm = epi_mm + rv_mm * crescent * bulge - 2
    coat_mm = np.maximum(epi_mm, rv_mm + 2.5)  # where the fat around the heart begins
    fat_mm = coat_mm + draw(1, 10) * near(draw(0.5, 2.4), 0.6) + draw(1, 12) * near(draw(3.6, 5.4), 0.6)
    axis_mm = draw(-20, 20, 2) * (s - 0.5) + draw(-1.5, 1.5, (canvas.slices, 2)).repeat(2, 0)  # tilt, breath
    x_mm, y_mm = canvas.turned(*np.float32(axis_mm.T)[:, :, None, None], draw(-0.5, 0.5))
    outflow_mm = epi_mm * (near(draw(1.9, 2.5), draw(0.4, 0.65)) > 0.4) * (s < 1 / canvas.slices)  # only in slice 0
    r_mm, angle = np.hypot(_slice_mean(x_mm), _slice_mean(y_mm)), np.arctan2(-_slice_mean(y_mm), _slice_mean(x_mm))
    drawn = [r_mm < around(_slice_mean(contour), angle) for contour in (lv_mm, outflow_mm, epi_mm, rv_mm)]
    label = np.select(drawn, [3, 0, 2, 1]).astype(np.uint8)  # as a reader draws, one contour per slice
    r_mm, angle = np.hypot(x_mm, y_mm), np.arctan2(-y_mm, x_mm)
    muscle, rough = muscle * draw(0.85, 1.15), draw(0.1, 0.4)  # trabeculae: muscle among the blood
    paint(r_mm - around(fat_mm, angle), FAT * draw(0.75, 1.2))
    paint(r_mm - around(coat_mm, angle), muscle)
    blood = BLOOD * draw(0.8, 1.1) * (1 - rough * np.clip(texture, 0, 1))
    paint(r_mm - around(rv_mm, angle), blood, 1 - canvas.cover(r_mm - around(epi_mm, angle)))
    paint(r_mm - around(outflow_mm, angle) + 1.5, BLOOD)  # to the reader it is background
    blood = BLOOD * (1 - rough * np.clip(4 * r_mm / around(lv_mm, angle) - 3, 0, 1) * np.clip(texture + 1, 0, 2))
    lv = paint(r_mm - around(lv_mm, angle), blood)
    for place in draw((0.7, 4.6), (1.3, 5.4)):  # papillary muscles
        body_mm = draw(0.16, 0.28) * lv_mm.mean(1) * np.exp(-(((s[:, 0] - draw(0.45, 0.6)) / 0.25) ** 2))
        arm_mm = np.float32(draw(0.55, 0.75) * lv_mm[:, int(place / (2 * np.pi) * ANGLES)])[:, None, None]
        apart_mm = np.sqrt(r_mm**2 + arm_mm**2 - 2 * r_mm * arm_mm * np.cos(angle - np.float32(place)))
        paint(apart_mm - np.float32(body_mm)[:, None, None], muscle, lv)
    return label
