"""Draw one bird before one background: flat illustration, soft light, every style parameter continuous.

`Scene` decides, `render` paints. The scene's numbers are drawn in the same order whatever the subject and the
background, so one random state gives a matched pair that differs in that attribute alone.
"""

import colorsys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SUBJECTS = ("landbird", "waterbird")
BACKGROUNDS = ("land", "water")

Array = NDArray[np.float64]
Points = Sequence[tuple[float, float]]
Vector = Sequence[float] | Array

OVERSAMPLING = 4
SKY_ROWS = 32  # the sky is smooth: it is computed on this many rows and columns and enlarged


class Scene:
    """The content of a picture, drawn at random; nothing in its style depends on the subject or on the background.

    Lengths are fractions of the image side, y grows downwards.
    """

    def __init__(self, subject: str, background: str, rng: np.random.Generator) -> None:
        self.subject, self.background = subject, background
        self.facing = 1 if rng.random() < 0.5 else -1  # 1 looks right
        self.tone = rng.random()  # of the plumage: yellow, orange, red (warm), then magenta, violet, blue (cool)
        self.light = rng.random()  # from dusk to noon
        self.x, self.ground = rng.uniform(0.44, 0.56), rng.uniform(0.8, 0.9)  # where the bird touches the ground
        self.size, self.tilt = rng.uniform(0.54, 0.66), rng.uniform(-0.08, 0.08)  # of the bird; the tilt in radians
        self.depth = rng.uniform(-1, 1)  # brightness of the plumage
        self.horizon = rng.uniform(0.42, 0.58)
        self.hue = rng.uniform(-1, 1)  # shift of the hue of grass and water
        self.details = rng.random(40)  # of sun, waves, tufts, trees and clouds

    @property
    def sun(self) -> tuple[float, float]:
        """Where it stands, higher in more light."""
        return 0.1 + 0.8 * self.details[0], 0.1 + 0.16 * self.details[1] + 0.1 * (1 - self.light)

    @property
    def sunlight(self) -> Array:
        """Its colour."""
        return _mix((1.0, 0.86, 0.66), (1.0, 0.98, 0.86), self.light)

    @property
    def attributes(self) -> dict[str, str]:
        """The attributes that are recorded beside the picture."""
        return {
            "subject": self.subject,
            "background": self.background,
            "colour": "warm" if self.tone < 0.5 else "cool",
            "side": "right" if self.facing > 0 else "left",
            "light": "bright" if self.light >= 0.5 else "dim",
        }


def render(scene: Scene, *, resolution: int = 64) -> Image.Image:
    """Paint a scene as an RGB picture of `resolution` x `resolution` pixels."""
    side = resolution * OVERSAMPLING
    image = _sky(scene).resize((side, side), Image.Resampling.BICUBIC)
    brush = Brush(image, tint=_mix((0.74, 0.68, 0.82), (1.0, 1.0, 1.0), scene.light))
    _distance(brush, scene)
    (_land if scene.background == "land" else _water)(brush, scene)
    brush.disc((scene.x, scene.ground), (0.36 * scene.size, 0.036), (0.06, 0.16, 0.24), 0.28)  # the bird's shadow
    brush.tint = _mix((0.84, 0.78, 0.92), (1.0, 1.0, 1.0), scene.light)
    _bird(brush, scene)
    return image.reduce(OVERSAMPLING)


# --- colours, and outlines as control points of smooth curves: birds look right and stand on y = 0

# fmt: off
PLUMAGE = np.array([
    (0.97, 0.75, 0.30), (0.95, 0.57, 0.26), (0.90, 0.39, 0.29), (0.82, 0.35, 0.48),
    (0.62, 0.39, 0.70), (0.44, 0.42, 0.80), (0.27, 0.43, 0.80),
])
"""Gold, orange, coral, rose, mauve, periwinkle, blue: warm up to the middle, cool from there."""
BEAK, LEG = (1.0, 0.68, 0.22), (0.40, 0.24, 0.20)
CLOUD = [(-1.2, 0.1), (-0.8, -0.1), (-0.4, -0.2), (0, -0.4), (0.4, -0.2), (0.9, -0.1), (1.2, 0.1), (0, 0.2)]
SONGBIRD_TAIL = [(-0.20, -0.36), (-0.54, -0.66), (-0.44, -0.72), (-0.16, -0.50)]
SONGBIRD_BEAK = [(0.36, -0.72), (0.53, -0.645), (0.36, -0.59)]
SONGBIRD_BODY = [
    (0.20, -0.83), (0.33, -0.79), (0.385, -0.66), (0.345, -0.52), (0.33, -0.38), (0.22, -0.24),
    (0.02, -0.175), (-0.18, -0.24), (-0.31, -0.40), (-0.20, -0.54), (-0.03, -0.60), (0.06, -0.74),
]
SONGBIRD_BREAST = [
    (0.345, -0.55), (0.32, -0.38), (0.21, -0.25), (0.03, -0.19), (0.02, -0.30), (0.14, -0.46), (0.25, -0.55),
]
SONGBIRD_WING = [
    (0.06, -0.50), (0.10, -0.40), (-0.02, -0.30), (-0.20, -0.31), (-0.37, -0.43), (-0.18, -0.49), (-0.06, -0.53),
]
SWAN_BEAK = [(0.34, -0.83), (0.46, -0.77), (0.64, -0.735), (0.63, -0.70), (0.34, -0.705)]
SWAN_BODY = [
    (-0.54, -0.33), (-0.40, -0.28), (-0.16, -0.32), (0.08, -0.30), (0.28, -0.26), (0.34, -0.15),
    (0.24, -0.03), (0.0, 0.0), (-0.24, -0.02), (-0.42, -0.14),
]
SWAN_NECK = [(0.20, -0.14), (0.31, -0.28), (0.25, -0.45), (0.16, -0.60), (0.20, -0.74), (0.31, -0.77)]
SWAN_HEAD = [(0.19, -0.77), (0.27, -0.845), (0.37, -0.825), (0.43, -0.76), (0.37, -0.69), (0.26, -0.685)]
SWAN_BELLY = [
    (0.31, -0.12), (0.23, -0.04), (0.0, -0.012), (-0.24, -0.03), (-0.36, -0.10), (-0.10, -0.09), (0.14, -0.10),
]
SWAN_WING = [
    (0.14, -0.26), (0.12, -0.16), (-0.06, -0.11), (-0.28, -0.15), (-0.50, -0.29), (-0.28, -0.31), (-0.06, -0.35),
]
# fmt: on


# --- tools


class Brush:
    """A pen in unit coordinates; colours are RGB in [0, 1] and are multiplied by `tint`."""

    def __init__(self, image: Image.Image, *, tint: Array) -> None:
        self.side, self.pen, self.tint = image.width, ImageDraw.Draw(image, "RGBA"), tint

    def ink(self, colour: Vector, alpha: float) -> tuple[int, ...]:
        """The tinted colour as 8-bit RGBA."""
        red, green, blue = np.clip(np.asarray(colour) * self.tint * 255, 0, 255)
        return int(red), int(green), int(blue), int(alpha * 255)

    def fill(self, outline: Array, colour: Vector, alpha: float = 1.0) -> None:
        """Fill a polygon given as (points, 2)."""
        self.pen.polygon((outline * self.side).ravel().tolist(), fill=self.ink(colour, alpha))

    def fill_below(self, line: Array, colour: Vector) -> None:
        """Fill everything below a line from left to right, (points, 2)."""
        self.fill(np.concatenate([line, [[line[-1, 0], 1.05], [line[0, 0], 1.05]]]), colour)

    def disc(self, centre: Vector, radius: tuple[float, float], colour: Vector, alpha: float = 1.0) -> None:
        """Fill an upright ellipse."""
        (x, y), (width, height) = centre, radius
        box = np.array([x - width, y - height, x + width, y + height]) * self.side
        self.pen.ellipse(box.tolist(), self.ink(colour, alpha))

    def stroke(self, path: Array, width: float, colour: Vector, alpha: float = 1.0) -> None:
        """Draw a line through (points, 2)."""
        pixels = max(1, round(width * self.side))
        self.pen.line((path * self.side).ravel().tolist(), self.ink(colour, alpha), pixels, joint="curve")


@lru_cache(maxsize=64)
def _spline(count: int, closed: bool) -> Array:
    """The Catmull-Rom matrix (samples, count) that interpolates `count` control points, eight samples a segment."""
    t = np.arange(8)[:, None] / 8
    basis = -(t**3) + 2 * t**2 - t, 3 * t**3 - 5 * t**2 + 2, -3 * t**3 + 4 * t**2 + t, t**3 - t**2
    around = np.pad(np.eye(count), ((1, 2), (0, 0)), "wrap" if closed else "edge")
    segments = count - (not closed)
    spans = [0.5 * weights * around[k : k + segments, None] for k, weights in enumerate(basis)]
    return np.concatenate([np.sum(spans, axis=0).reshape(-1, count), np.eye(count)[segments:]])


def _curve(points: Points | Array, *, closed: bool = True) -> Array:
    """A smooth curve (samples, 2) through control points."""
    return _spline(len(points), closed) @ np.asarray(points, dtype=float)


def _mix(low: Vector, high: Vector, share: float) -> Array:
    return (1 - share) * np.asarray(low, dtype=float) + share * np.asarray(high, dtype=float)


def _hsv(hue: float, saturation: float, value: float) -> Array:
    """RGB from a hue in degrees."""
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


# --- backgrounds


def _sky(scene: Scene) -> Image.Image:
    """The sky with the sun's glow, shared by both backgrounds."""
    top = _mix((0.38, 0.36, 0.60), (0.47, 0.75, 0.94), scene.light)
    bottom = _mix((0.97, 0.70, 0.58), (0.93, 0.97, 0.97), scene.light)
    y, x = np.mgrid[0:SKY_ROWS, 0:SKY_ROWS] / (SKY_ROWS - 1)
    height = np.clip(y / scene.horizon, 0, 1)[..., None]
    sky = (1 - height) * top + height * bottom
    sun_x, sun_y = scene.sun
    distance = np.sqrt((x - sun_x) ** 2 + (y - sun_y) ** 2)[..., None]
    glow = 0.6 * np.exp(-((distance / 0.22) ** 2))
    sky = sky + glow * (scene.sunlight - sky)
    return Image.fromarray((np.clip(sky, 0, 1) * 255).astype(np.uint8))


def _distance(brush: Brush, scene: Scene) -> None:
    """The sun, clouds and a far blue ridge, shared by both backgrounds."""
    d = scene.details
    brush.disc(scene.sun, (0.06, 0.06), scene.sunlight / brush.tint, 0.9)
    for x, y, width in ((d[2], 0.08 + 0.14 * d[3], d[4]), (d[5], 0.14 + 0.16 * d[6], d[7])):
        width = 0.10 + 0.08 * width
        brush.fill(_curve(CLOUD) * width + (x, y), (1.0, 1.0, 1.0), 0.55)
    haze = _mix((0.66, 0.56, 0.74), (0.66, 0.79, 0.88), scene.light) / brush.tint
    brush.fill_below(_ridge(scene.horizon - 0.02 - 0.10 * d[8:14]), haze)


def _ridge(heights: Array) -> Array:
    """A smooth line over the whole width, (samples, 2)."""
    return _curve(np.column_stack([np.linspace(-0.1, 1.1, len(heights)), heights]), closed=False)


def _land(brush: Brush, scene: Scene) -> None:
    """Rolling meadow with trees on the far hill and tufts of grass in front."""
    d, horizon = scene.details, scene.horizon
    hue = 104 + 16 * scene.hue
    far = _ridge(horizon + 0.07 * (d[14:19] - 0.5))
    for k in range(3):
        x = d[19 + k]
        y = float(np.interp(x, far[:, 0], far[:, 1]))
        radius = 0.032 + 0.024 * d[22 + k]
        brush.stroke(np.array([[x, y + 0.02], [x, y - radius]]), 0.014, (0.45, 0.34, 0.28))
        crown = _hsv(hue + 16, 0.52, 0.50)
        brush.disc((x, y - 1.5 * radius), (radius, 1.25 * radius), crown)
        brush.disc((x - 0.25 * radius, y - 1.8 * radius), (0.6 * radius, 0.7 * radius), crown * 1.14)
    brush.fill_below(far, _hsv(hue - 14, 0.44, 0.76))
    brush.fill_below(_ridge(horizon + 0.14 + 0.10 * (d[25:30] - 0.5)), _hsv(hue - 6, 0.50, 0.68))
    brush.fill_below(_ridge(horizon + 0.27 + 0.08 * (d[30:35] - 0.5)), _hsv(hue, 0.54, 0.60))
    for k in range(5):
        x, y = (k + 0.15 + 0.7 * d[35 + k]) / 5, 0.84 + 0.15 * d[14 + k]
        for lean in (-0.016, 0.0, 0.016):
            blade = np.array([[x - 0.008, y], [x + lean, y - 0.05], [x + 0.008, y]])
            brush.fill(blade, _hsv(hue + 8, 0.58, 0.47))


def _water(brush: Brush, scene: Scene) -> None:
    """A lake that lightens towards the horizon, with the sun's glitter, waves and rings of light around the bird."""
    d, horizon = scene.details, scene.horizon
    hue = 189 + 9 * scene.hue
    far, near = _hsv(hue - 6, 0.34, 0.88), _hsv(hue + 4, 0.66, 0.62)
    xs, bands = np.linspace(0, 1, 9), 14
    for k in range(bands):
        y = horizon + (1 - horizon) * k / bands
        edge = y + (0.005 * np.sin(2 * np.pi * (xs * 2 + d[14] + 0.37 * k)) if k else 0 * xs)
        brush.fill_below(np.column_stack([xs, edge]), _mix(far, near, (k / (bands - 1)) ** 0.8))
    glitter = _mix((1.0, 0.86, 0.68), (1.0, 1.0, 0.94), scene.light)
    for k in range(6):
        width = (0.04 + 0.02 * k) * (0.6 + 0.8 * d[15 + k])
        centre = scene.sun[0] + 0.05 * (d[21 + k] - 0.5), horizon + 0.02 + 0.075 * k
        brush.disc(centre, (width, 0.006 + 0.001 * k), glitter / brush.tint, 0.45)
    for k in range(8):
        y = horizon + 0.07 + (0.95 - horizon) * (k + 0.8 * d[27 + k]) / 8
        x, width = (0.13 + 0.61803 * k + d[35]) % 1.1 - 0.05, 0.05 + 0.05 * (y - horizon) / (1 - horizon)
        crests = [(x + width * step, y - 0.012 * (abs(step) == 0.5)) for step in (-1, -0.5, 0, 0.5, 1)]
        brush.stroke(_curve(crests, closed=False), 0.012, (0.93, 0.99, 1.0), 0.55)
    for grow in (1.25, 1.05):
        brush.disc((scene.x, scene.ground), (0.36 * scene.size * grow, 0.06 * grow), (0.92, 0.99, 1.0), 0.22)


# --- birds


def _bird(brush: Brush, scene: Scene) -> None:
    """A songbird (round body, thin legs, upright tail) or a bird like a swan (boat of a body, long S of a neck)."""
    cos, sin = np.cos(scene.tilt) * scene.size, np.sin(scene.tilt) * scene.size
    matrix = np.array([[cos * scene.facing, sin], [-sin * scene.facing, cos]])

    def place(points: Points | Array) -> Array:
        """From the bird's own coordinates, (points, 2), to the picture's."""
        return np.asarray(points, dtype=float) @ matrix + np.array([scene.x, scene.ground])

    stops = np.linspace(0, 1, len(PLUMAGE))
    main = np.array([np.interp(scene.tone, stops, channel) for channel in PLUMAGE.T]) * (0.98 + 0.06 * scene.depth)
    dark, pale = main * (0.66, 0.60, 0.72), _mix(main, (1.0, 0.96, 0.88), 0.70)
    parts: list[tuple[Points | Array, Vector]]
    if scene.subject == "landbird":
        for x in (-0.07, 0.07):
            leg, foot = [(x - 0.01, -0.24), (x + 0.01, -0.01)], [(x - 0.05, 0.0), (x + 0.01, -0.02), (x + 0.09, 0.0)]
            brush.stroke(place(leg), 0.030 * scene.size, LEG)
            brush.stroke(place(foot), 0.028 * scene.size, LEG)
        parts = [(SONGBIRD_TAIL, dark), (SONGBIRD_BEAK, BEAK), (_curve(SONGBIRD_BODY), main)]
        parts += [(_curve(SONGBIRD_BREAST), pale), (_curve(SONGBIRD_WING), dark)]
        eye, radius = (0.25, -0.69), 0.036 * scene.size
    else:
        neck = _curve(SWAN_NECK, closed=False)
        slope = np.gradient(neck, axis=0)
        normal = np.column_stack([-slope[:, 1], slope[:, 0]]) / np.linalg.norm(slope, axis=1, keepdims=True)
        width = np.interp(np.linspace(0, 1, len(neck)), [0, 0.25, 0.6, 1], [0.13, 0.09, 0.062, 0.066])[:, None]
        sides = np.concatenate([neck + width * normal, (neck - width * normal)[::-1]])
        parts = [(SWAN_BEAK, BEAK), (_curve(SWAN_BODY), main), (sides, main), (_curve(SWAN_HEAD), main)]
        parts += [(_curve(SWAN_BELLY), pale), (_curve(SWAN_WING), dark)]
        eye, radius = (0.32, -0.775), 0.030 * scene.size
    for outline, colour in parts:
        brush.fill(place(outline), colour)
    centre = place([eye])[0]
    brush.disc(centre, (radius, radius), (0.12, 0.10, 0.16))
    brush.disc(centre + radius * np.array([0.3, -0.35]), (0.36 * radius, 0.36 * radius), (1.0, 1.0, 1.0))
