"""A drawn data set: one machined flange photographed many times, a few of them defective."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]  # [SIZE, SIZE]; brightness runs from 0 to 1

PRODUCT = "flange"
KINDS = ("scratch", "stain", "chip", "missing_hole")
SIZE = 448  # pixels, both sides

# The part's drawing, in pixels of the picture, origin at its centre, y downwards.
OUTER, HUB, BORE = 184.0, 98.0, 50.0
GROOVE, GROOVE_HALF_WIDTH = 80.0, 4.0
BOLT_CIRCLE, BOLT_RADIUS, BOLTS = 141.0, 17.0, 6
KEYWAY_HALF_WIDTH, KEYWAY_REACH = 9.0, 63.0


def draw_demo(root: Path, seed: int = 0, count: int = 24, defects: int = 6) -> Path:
    """Draw a product category with known defects under `root` and return its folder.

    The layout is MVTec's: `test/good/000.png`, `test/<kind>/000.png`, `ground_truth/<kind>/000_mask.png` (0 or 255).
    `count` images of 448 x 448 pixels, `defects` of them defective, the kinds in turn; one seed always draws the same
    pixels. Raises ValueError unless 0 <= defects <= count, and OSError if a file cannot be written.
    """
    if not 0 <= defects <= count:
        raise ValueError(f"{defects} defective images out of {count}: give 0 <= defects <= count")
    category = Path(root) / PRODUCT
    good = count - defects
    for index in range(count):
        # One generator per image, so that a picture does not depend on the ones drawn before it.
        rng = np.random.default_rng([seed, index])
        if index < good:
            image, _ = draw_image(rng, None)
            _write(category / "test" / "good" / f"{index:03d}.png", image)
        else:
            turn, which = divmod(index - good, len(KINDS))
            image, mask = draw_image(rng, KINDS[which])
            _write(category / "test" / KINDS[which] / f"{turn:03d}.png", image)
            _write(category / "ground_truth" / KINDS[which] / f"{turn:03d}_mask.png", mask)
    return category


def draw_image(rng: np.random.Generator, kind: str | None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one photograph and the mask of its defect; `kind` is one of KINDS, or None for a good part.

    Returns the image [448, 448, 3] (BGR) and the mask [448, 448] (0 or 255).
    """
    # A fixture holds the part: it is never quite in the same place, but nearly.
    centre = SIZE / 2 - 0.5 + rng.uniform(-5, 5, 2)
    turn = rng.normal(0, np.radians(1.3))
    lamp = np.radians(-128 + rng.normal(0, 2.5))  # direction towards the lamp, in the picture
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    dx, dy = xs - np.float32(centre[0]), ys - np.float32(centre[1])
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx  # the part's own axes
    r = np.hypot(u, v)

    rim, fracture = _break_rim(rng, u, v, r) if kind == "chip" else (np.full_like(r, OUTER), np.zeros_like(r))
    missing = int(rng.integers(BOLTS)) if kind == "missing_hole" else None
    solid = np.minimum(rim - r, _hole_distance(u, v, r, missing))  # to the nearest edge, positive inside the metal

    metal = _machine(rng, u, v, r, solid, lamp - turn)
    if missing is not None:  # the drill never came, the centre punch did
        metal = metal * (1 - 0.5 * np.exp(-((_bolt_distance(u, v, missing) / 1.8) ** 2)))
    metal += fracture * (0.33 + 0.11 * _cloud(rng, 1.2) + 0.05 * _cloud(rng, 4) - metal)
    warmth = rng.normal(0.012, 0.010)
    tint = np.array([1 - warmth, 1 - warmth / 2, 1])
    part = metal[..., None] * tint.astype(np.float32)  # [S, S, 3], BGR

    mask = np.zeros((SIZE, SIZE), bool)
    if kind == "scratch":
        part, mask = _scratch(rng, part, centre, solid)
    elif kind == "stain":
        part, mask = _stain(rng, part, centre, xs, ys, solid)
    elif kind == "chip":
        mask = (r <= OUTER) & ((r > rim) | (fracture > 0.3))
    elif missing is not None:
        mask = _bolt_distance(u, v, missing) < BOLT_RADIUS

    cover = np.clip(solid + 0.5, 0, 1)  # the share of each pixel that is metal: anti-aliased edges
    scene = _mat(rng, xs, ys, cover, lamp) * (1 - cover[..., None]) + part * cover[..., None]
    return _photograph(rng, scene, xs, ys), mask.astype(np.uint8) * 255


def _write(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # OpenCV's own writer cannot open every path that Python can.
    path.write_bytes(cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())


def _blur(image: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)


def _cloud(rng: np.random.Generator, scale: float) -> Plane:
    """Smooth noise of unit deviation whose grains are about `scale` pixels wide."""
    step = max(1, int(scale))  # coarse noise is drawn on a coarse grid
    grid = rng.standard_normal((SIZE // step + 2, SIZE // step + 2), dtype=np.float32)
    large = cv2.resize(_blur(grid, scale / step), None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
    cloud: Plane = np.array(large[:SIZE, :SIZE], np.float32)
    cloud /= np.float32(cloud.std())
    return cloud


def _bolt_distance(u: Plane, v: Plane, bolt: int) -> Plane:
    angle = (bolt + 0.5) * 2 * np.pi / BOLTS
    x, y = np.float32(BOLT_CIRCLE * np.cos(angle)), np.float32(BOLT_CIRCLE * np.sin(angle))
    distance: Plane = np.hypot(u - x, v - y)
    return distance


def _hole_distance(u: Plane, v: Plane, r: Plane, missing: int | None) -> Plane:
    """Distance to the nearest hole's edge in pixels, negative inside a hole."""
    keyway = np.maximum(np.abs(u) - KEYWAY_HALF_WIDTH, np.abs(v + KEYWAY_REACH / 2) - KEYWAY_REACH / 2)
    distance: Plane = np.minimum(r - BORE, keyway)
    for bolt in range(BOLTS):
        if bolt != missing:
            distance = np.minimum(distance, _bolt_distance(u, v, bolt) - BOLT_RADIUS)
    return distance


def _machine(rng: np.random.Generator, u: Plane, v: Plane, r: Plane, solid: Plane, lamp: float) -> Plane:
    """Brightness of the turned metal under a lamp at angle `lamp`: lathe marks, steps, chamfered edges."""
    theta = np.arctan2(v, u) - np.float32(lamp)
    radii = np.arange(0, SIZE, 0.5)
    marks = np.convolve(rng.standard_normal(radii.size), [0.25, 0.5, 0.25], "same")
    marks += 1.4 * np.convolve(rng.standard_normal(radii.size), np.hanning(13) / 3, "same")
    rings = np.interp(r, radii, marks).astype(np.float32)

    # A turned face reflects a lamp as two opposite fans; every ring's fan is a little turned.
    fan = np.exp(-((np.sin(theta + 0.045 * rings) / 0.42) ** 2))
    second = np.exp(-((np.sin(theta - 1.25 + 0.045 * rings) / 0.30) ** 2))
    shade = 0.47 + 0.22 * fan + 0.10 * second + 0.016 * rings
    shade += np.where(r < HUB, 0.045, 0).astype(np.float32)  # the hub's face is turned finer

    # Radial slopes, positive where the metal falls outwards: the hub's step and the groove's two walls.
    slope = np.exp(-(((r - HUB) / 3.0) ** 2))
    slope += np.exp(-(((r - GROOVE + GROOVE_HALF_WIDTH) / 1.4) ** 2))
    slope -= np.exp(-(((r - GROOVE - GROOVE_HALF_WIDTH) / 1.4) ** 2))
    shade += 0.30 * slope * np.cos(theta)
    shade -= 0.10 * (np.abs(r - GROOVE) < GROOVE_HALF_WIDTH)
    # The hub stands proud: it shades the flange on the side away from the lamp.
    shade *= 1 - 0.22 * np.exp(-np.maximum(r - HUB, 0) / 9) * np.clip(-np.cos(theta), 0, 1) * (r > HUB)

    # The chamfer falls towards the nearest edge.
    chamfer = np.clip(1.6 - solid / 2.6, 0, 1)
    across, down = cv2.Sobel(solid, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(solid, cv2.CV_32F, 0, 1, scale=1 / 8)
    # The gradients are taken in the picture; the part is turned so little against it that the lamp may be shared.
    towards = -(across * np.float32(np.cos(lamp)) + down * np.float32(np.sin(lamp)))
    shade += chamfer * (0.40 * towards - 0.06)
    metal: Plane = shade + 0.012 * (_cloud(rng, 1.0) + _cloud(rng, 40))
    return metal


def _break_rim(rng: np.random.Generator, u: Plane, v: Plane, r: Plane) -> tuple[Plane, Plane]:
    """A piece broken out of the rim: the outer radius for every pixel, and how much of it is bare fracture (0 to 1)."""
    at, width, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.14), rng.uniform(13, 22)
    angles = np.linspace(-np.pi, np.pi, 2048)
    offset = (angles - at + np.pi) % (2 * np.pi) - np.pi
    jagged = 1 + 0.30 * np.interp(angles, np.linspace(-np.pi, np.pi, 150), rng.standard_normal(150))
    bite = depth * np.clip(1.25 * (1 - (offset / width) ** 2), 0, 1) * np.clip(jagged, 0.4, 1.7)
    theta = np.arctan2(v, u)
    rim, inner = OUTER - np.interp(theta, angles, 0.6 * bite), OUTER - np.interp(theta, angles, bite)
    fracture = np.clip(r - inner + 0.5, 0, 1) * (inner < OUTER)
    return rim.astype(np.float32), fracture.astype(np.float32)


def _spot(rng: np.random.Generator, centre: NDArray[np.float64]) -> NDArray[np.float64]:
    """A random place within the part's outline, x and y in pixels of the picture."""
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(BORE, OUTER)
    return centre + radius * np.array([np.cos(angle), np.sin(angle)])


def _scratch(
    rng: np.random.Generator, part: NDArray[np.float32], centre: NDArray[np.float64], solid: Plane
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A tool's slip: a shallow arc whose depth swells and fades, bright on one lip and dark on the other."""
    while True:  # until it lies on metal and crosses the lathe's marks, which would hide it
        steps = np.arange(0, rng.uniform(55, 115))
        headings = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.006) * steps
        line = _spot(rng, centre) + np.stack([np.cos(headings), np.sin(headings)], 1).cumsum(0)
        columns, rows = np.clip(line, 0, SIZE - 1).astype(int).T
        radii = np.hypot(*(line - centre).T)
        if np.mean(solid[rows, columns] > 3) > 0.9 and np.ptp(radii) > 0.4 * len(steps):
            break
    pressure = np.sin(np.pi * (steps + 2) / (steps[-1] + 4)) ** 0.5 * (1 + 0.25 * np.sin(steps / rng.uniform(5, 11)))
    core, lip = np.zeros((SIZE, SIZE), np.float32), np.zeros((SIZE, SIZE), np.float32)
    width = rng.uniform(1.1, 1.7)
    _stroke(core, line, pressure, width)
    _stroke(lip, line + 1.8 * np.stack([-np.sin(headings), np.cos(headings)], 1), pressure, width)
    mask = (cv2.dilate(np.maximum(core, lip), np.ones((3, 3))) > 0.25) & (solid > 0.5)
    lit = np.clip(core, 0, 1)[..., None] * np.float32(rng.uniform(0.65, 0.85))
    dark = np.clip(lip, 0, 1)[..., None] * np.float32(0.55)
    return part * (1 - dark) * (1 - lit) + lit * np.float32(0.93), mask


def _stroke(plane: Plane, line: NDArray[np.float64], pressure: NDArray[np.float64], width: float) -> None:
    """Lay down a line of points [T, 2] as Gaussian dabs, in place; heights follow `pressure` [T]."""
    reach = np.arange(-5, 6)
    for (x, y), strength in zip(line, pressure, strict=True):
        columns, rows = round(x) + reach, round(y) + reach
        if columns[0] < 0 or rows[0] < 0 or columns[-1] >= SIZE or rows[-1] >= SIZE:
            continue
        dab = np.exp(-((columns - x) ** 2 + (rows[:, None] - y) ** 2) / (width * width))
        window = plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        np.maximum(window, (strength * dab).astype(np.float32), out=window)


def _stain(
    rng: np.random.Generator, part: NDArray[np.float32], centre: NDArray[np.float64], xs: Plane, ys: Plane, solid: Plane
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Dried oil or rust water: a blotch of ragged outline that thins out towards its border, with a few splashes."""
    spot = _spot(rng, centre)
    while solid[int(spot[1]), int(spot[0])] < 10:
        spot = _spot(rng, centre)
    radius = rng.uniform(19, 32)
    splashes = [(spot, radius)]
    for _ in range(int(rng.integers(2, 6))):
        splashes.append((spot + rng.normal(0, 1.0 * radius, 2), rng.uniform(0.06, 0.20) * radius))
    ragged = 0.20 * _cloud(rng, 9) + 0.09 * _cloud(rng, 3) + 0.05 * _cloud(rng, 1.2)
    depth = np.full_like(xs, -np.inf)
    for (x, y), size in splashes:
        depth = np.maximum(depth, size * (1 + ragged) - np.hypot(xs - np.float32(x), ys - np.float32(y)))
    body = np.clip(depth / 5 + 0.5, 0, 1)
    opacity = body * np.clip(0.42 + 0.012 * depth + 0.13 * _cloud(rng, 6) + 0.06 * _cloud(rng, 1.2), 0.15, 0.85)
    colour = np.array([[0.09, 0.20, 0.36], [0.06, 0.09, 0.13]], np.float32)[int(rng.integers(2))]  # rust, burnt oil
    mask = (body > 0.5) & (solid > 0.5)
    return part * (1 - opacity[..., None]) + opacity[..., None] * colour, mask


def _mat(rng: np.random.Generator, xs: Plane, ys: Plane, cover: Plane, lamp: float) -> NDArray[np.float32]:
    """The ribbed rubber mat under the part, with the part's shadow."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    slant = rng.normal(0, 0.012)
    wander = 0.25 * _cloud(rng, 30)
    rib = np.sin((xs + ys * np.float32(slant)) * np.float32(2 * np.pi / 9) + wander + np.float32(phase[0]))
    weft = np.sin((ys - xs * np.float32(slant)) * np.float32(2 * np.pi / 9) + wander + np.float32(phase[1]))
    mat = (
        0.185 + 0.020 * rib * weft + 0.012 * np.maximum(rib, weft) + 0.010 * _cloud(rng, 1.0) + 0.008 * _cloud(rng, 25)
    )
    shift = np.array([[1, 0, -9 * np.cos(lamp)], [0, 1, -9 * np.sin(lamp)]])
    cast = _blur(np.asarray(cv2.warpAffine(cover, shift, (SIZE, SIZE)), np.float32), 4.0)
    contact = _blur(cover, 11.0)
    mat *= (1 - 0.55 * cast) * (1 - 0.35 * contact)
    shaded: NDArray[np.float32] = mat[..., None] * np.array([1.10, 1.0, 0.90], np.float32)
    return shaded


def _photograph(rng: np.random.Generator, scene: NDArray[np.float32], xs: Plane, ys: Plane) -> NDArray[np.uint8]:
    """Exposure, uneven light, vignetting, the lens's blur and the sensor's noise; BGR bytes."""
    x, y = xs / SIZE - 0.5, ys / SIZE - 0.5
    fall = rng.normal(0, 0.035, 2)
    light = (
        (1 + rng.normal(0, 0.02))
        * (1 + np.float32(fall[0]) * x + np.float32(fall[1]) * y)
        * (1 - 0.22 * (x * x + y * y))
    )
    seen = _blur(scene * light[..., None].astype(np.float32), 0.6)
    seen += 0.008 * rng.standard_normal(seen.shape[:2], dtype=np.float32)[..., None]
    seen += 0.004 * rng.standard_normal(seen.shape, dtype=np.float32)
    picture: NDArray[np.uint8] = np.clip(seen * 255 + 0.5, 0, 255).astype(np.uint8)
    return picture
