"""The built-in images: cartoon cats, drawn by code from a seed."""

import numpy as np
from PIL import Image, ImageDraw

COUNT = 2048

FURS = {  # fur, its darker markings
    "ginger": ((236, 150, 64), (196, 104, 32)),
    "grey": ((150, 150, 158), (104, 104, 114)),
    "black": ((70, 66, 74), (42, 40, 48)),
    "white": ((240, 236, 226), (206, 196, 180)),
    "brown": ((150, 104, 70), (104, 68, 44)),
    "cream": ((238, 208, 156), (204, 162, 104)),
}
BACKGROUNDS = [(126, 190, 228), (150, 204, 142), (244, 214, 120), (232, 160, 170), (178, 160, 218), (120, 200, 192)]
EYES = [(120, 200, 80), (240, 200, 60), (100, 180, 240)]
CIRCLE = np.stack([np.cos(np.arange(0, 2 * np.pi, 0.16)), np.sin(np.arange(0, 2 * np.pi, 0.16))], axis=1)
OUTLINE, NOSE, WHISKERS = (40, 32, 36), (226, 110, 120), (250, 250, 250)


def choose_fur(rng: np.random.Generator) -> int:
    """The number of a cat's fur in `FURS`, its first draw."""
    return int(rng.integers(len(FURS)))


def draw_cat(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Draws one cat, uint8 (image_size, image_size, 3), several times larger and reduced for antialiasing."""
    size = max(256, 4 * image_size)
    fur, marking = list(FURS.values())[choose_fur(rng)]
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    eye = EYES[rng.integers(len(EYES))]
    striped, with_bib = rng.random() < 0.5, rng.random() < 0.4
    scale = rng.uniform(0.9, 1.12)
    left, up = rng.uniform(-0.07, 0.07), rng.uniform(-0.03, 0.05)
    gaze, ear, tilt = rng.uniform(-0.02, 0.02), rng.uniform(-0.04, 0.05), rng.uniform(-12, 12)

    image = Image.new("RGB", (size, size), background)
    pen = ImageDraw.Draw(image)
    line = max(1, round(0.022 * size * scale))

    turn = np.deg2rad(tilt)
    turn = 0.42 * scale * size * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    middle = size * np.array([0.5 + left, 0.47 + up])

    def place(*points):
        """Converts points from the cat's own coordinates, -1 … 1 around the middle of its head, to pixels."""
        return (np.array(points) @ turn + middle).ravel().tolist()

    def shape(points, fill, outline=OUTLINE):
        points = place(*points)
        pen.polygon(points, fill=fill)
        if outline:
            pen.line(points + points[:4], fill=outline, width=line, joint="curve")

    def ellipse(x, y, width, height, fill, outline=OUTLINE):
        shape(CIRCLE * (width, height) + (x, y), fill, outline)

    ellipse(0, 1.35, 0.78, 0.85, fur)  # shoulders
    if with_bib:
        ellipse(0, 1.3, 0.34, 0.5, (250, 248, 244), outline=None)
    for side in -1, 1:
        tip = (side * (0.68 + ear), -0.98)
        shape([(side * 0.78, -0.22), tip, (side * 0.2, -0.6)], fur)
        shape([(side * 0.66, -0.42), (side * (0.64 + ear), -0.8), (side * 0.38, -0.58)], NOSE, outline=None)
    ellipse(0, 0, 0.86, 0.72, fur)
    if striped:
        for x in -0.22, 0, 0.22:
            shape([(x - 0.06, -0.66 + abs(x) * 0.2), (x + 0.06, -0.66 + abs(x) * 0.2), (x, -0.32)], marking, None)
    ellipse(0, 0.36, 0.36, 0.26, (250, 248, 244) if with_bib else tuple((3 * c + 255) // 4 for c in fur), outline=None)
    for side in -1, 1:
        ellipse(side * 0.36, -0.06, 0.19, 0.2, eye)
        ellipse(side * 0.36 + gaze, -0.06, 0.07, 0.16, (20, 18, 22), outline=None)
        for angle in -0.08, 0.1:
            hair = place((side * 0.34, 0.34 + angle), (side * 1.04, 0.3 + 2.4 * angle))
            pen.line(hair, fill=WHISKERS, width=max(1, line // 2))
    shape([(-0.1, 0.18), (0.1, 0.18), (0, 0.3)], NOSE, outline=None)
    for side in -1, 1:
        mouth = place((0, 0.3), (side * 0.06, 0.44), (side * 0.2, 0.44))
        pen.line(mouth, fill=OUTLINE, width=max(1, 2 * line // 3), joint="curve")

    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BOX))


def draw_cats(image_size: int, count: int = COUNT, seed: int = 0) -> np.ndarray:
    """Draws cats, uint8 (count, image_size, image_size, 3); cat k depends only on the seed and k."""
    return np.stack([draw_cat(np.random.default_rng([seed, k]), image_size) for k in range(count)])


def choose_furs(count: int = COUNT, seed: int = 0) -> np.ndarray:
    """The furs of the cats that `draw_cats` draws, numbers in `FURS`, int32 (count,)."""
    return np.array([choose_fur(np.random.default_rng([seed, k])) for k in range(count)], np.int32)
