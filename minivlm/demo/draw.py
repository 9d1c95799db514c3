"""A scene on paper: the picture (`render`) and, per pixel, what is drawn there (`label_map`), at any size.

Points are (x, y) in this file alone, as PIL wants them.
"""

from functools import cache, lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from minivlm.demo.scene import COLOURS, LETTER_HEIGHT, LETTERS, SHAPES, SIGN_HEIGHT, Scene, Sign, Thing

OVERSAMPLING = 2  # pixels drawn per pixel shown, along each side: smooth edges
GAP = 1.8  # units between letters
I_WIDTH = 2.9  # units, the least that a letter is wide in a label map
GLYPH = 128  # pixels, the height in which letters are drawn before they are shrunk
CLASS_NAMES = ("background", *(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS), "sign", *LETTERS)
_CLASS = {name: number for number, name in enumerate(CLASS_NAMES)}

_PALETTES = (  # top left, bottom right
    ((255, 248, 232), (251, 226, 205)),
    ((236, 247, 255), (204, 226, 244)),
    ((240, 250, 240), (205, 232, 218)),
    ((248, 242, 255), (224, 214, 242)),
    ((255, 243, 243), (240, 216, 222)),
    ((250, 250, 246), (224, 226, 224)),
    ((255, 252, 230), (216, 238, 232)),
    ((255, 240, 230), (216, 220, 244)),
)
_SIGN_STYLES = (  # board, rim, ink
    ((255, 255, 252), (120, 112, 104), (30, 32, 40)),
    ((46, 52, 64), (22, 26, 34), (255, 255, 255)),
    ((240, 220, 180), (140, 100, 60), (58, 34, 16)),
)
_SHADOW = (60, 60, 90, 46)


def _turned(points, angle):
    c, s = cos(angle * pi / 180), sin(angle * pi / 180)
    return [(x * c - y * s, x * s + y * c) for x, y in points]


def _heart(t):
    return 16 * sin(t) ** 3 / 17, (-13 * cos(t) + 5 * cos(2 * t) + 2 * cos(3 * t) + cos(4 * t) - 1.5) / 17


_OUTLINES = {  # around (0, 0), about as large as a circle of radius 1
    "square": [(x * 0.73, y * 0.73) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))],
    "triangle": [(sin(t) * 1.1, -cos(t) * 1.1 + 0.14) for t in (0, 2 * pi / 3, 4 * pi / 3)],
    "star": [(sin(i * pi / 5) * r, -cos(i * pi / 5) * r) for i, r in enumerate((1.08, 0.44) * 5)],
    "heart": [_heart(2 * pi * i / 40) for i in range(40)],
}


def _draw_shape(draw, thing: Thing, scale, grow, shift, fill):
    """The thing's outline, `grow` units fatter all round and moved by `shift` units right and down."""
    x, y = (thing.x + shift) * scale, (thing.y + shift) * scale
    r = (thing.radius + grow) * scale
    if thing.shape == "circle":
        r *= 0.88  # looks as large as the others
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        draw.polygon([(x + r * u, y + r * v) for u, v in _turned(_OUTLINES[thing.shape], thing.angle)], fill=fill)


@cache
def _big_glyph(letter):
    """The letter in white on black, GLYPH pixels high and slightly emboldened, cut to its own width. Pillow's
    own font needs no file, and shrunk from this size nothing is left of the hinting in which its versions could differ.
    """
    font, mask = ImageFont.load_default(160), Image.new("L", (220, GLYPH))
    ImageDraw.Draw(mask).text((20, -40), letter, font=font, fill=255, stroke_width=3)
    left, _, right, _ = mask.getbbox()
    return mask.crop((left, 0, right, GLYPH))


def _glyph_width(letter):
    """Units; letters are set narrower than the font has them, W most, so that five of them fit a cell."""
    return min(7.4, _big_glyph(letter).width * LETTER_HEIGHT / GLYPH * 0.76)


@lru_cache(maxsize=4096)
def _glyph(letter, height, width):
    return _big_glyph(letter).resize((width, height), Image.Resampling.BOX)


def _signs(scene: Scene):
    return ((scene.sign,) if scene.sign else ()) + scene.small_print


def _sign_boxes(sign: Sign):
    """Board and letters as boxes (left, top, right, bottom) in units."""
    widths = [_glyph_width(letter) for letter in sign.text]
    text_width = sum(widths) + GAP * (len(widths) - 1)
    half_width, half_height = text_width / 2 + 3.5, SIGN_HEIGHT / 2
    x, boxes = sign.x - text_width / 2, []
    for width in widths:
        boxes.append((x, sign.y - LETTER_HEIGHT / 2, x + width, sign.y + LETTER_HEIGHT / 2))
        x += width + GAP
    return (sign.x - half_width, sign.y - half_height, sign.x + half_width, sign.y + half_height), boxes


def _backdrop(scene: Scene, height, width):
    palette, pattern = scene.backdrop
    light, deep = (np.array(colour) for colour in _PALETTES[palette])
    corners = np.stack([light, (light + deep) / 2, (light + deep) / 2, deep]).reshape(2, 2, 3)
    inner = (0.5, 0.5, 1.5, 1.5)  # from pixel middle to pixel middle: bilinear all the way
    paper = Image.fromarray(corners.round().astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR, inner)
    draw = ImageDraw.Draw(paper, "RGBA")
    if pattern == 1:  # two soft hills
        for left, right, top in ((-0.5, 0.8, 0.62), (0.3, 1.6, 0.72)):
            draw.ellipse((left * width, top * height, right * width, (top + 0.9) * height), fill=(255, 255, 255, 70))
    elif pattern == 2:  # broad rays of light
        for i in range(5):
            x = (0.42 * i - 0.5) * width
            ray = [(x + 0.5 * width, 0), (x + 0.68 * width, 0), (x + 0.18 * width, height), (x, height)]
            draw.polygon(ray, fill=(255, 255, 255, 64))
    return paper


def _sizes(scene, height, width):
    """Pixels per unit, and two (height, width): to draw in, of the scene's proportions, and to squash that to."""
    height = height or 2 * scene.height
    width = width or round(height * scene.width / scene.height)
    scale = max(height / scene.height, width / scene.width)
    natural = round(scale * scene.height), round(scale * scene.width)
    if abs(natural[0] - height) + abs(natural[1] - width) <= 1:  # proportions that whole pixels cannot keep
        natural = height, width
    return scale, natural, (height, width)


def render(scene: Scene, height: int | None = None, width: int | None = None) -> Image.Image:
    """The scene as an RGB picture of `height` × `width` pixels: two pixels per unit where no height is given, the
    scene's own proportions where no width is, squashed where both are given and ask for it."""
    scale, natural, wanted = _sizes(scene, height, width)
    scale *= OVERSAMPLING  # drawn pixels per unit
    paper = _backdrop(scene, OVERSAMPLING * natural[0], OVERSAMPLING * natural[1])
    draw = ImageDraw.Draw(paper, "RGBA")
    for thing in scene.things:
        r, g, b = COLOURS[thing.colour]
        _draw_shape(draw, thing, scale, 0.4, 1.2, _SHADOW)
        _draw_shape(draw, thing, scale, 0.4, 0, (r * 7 // 10, g * 7 // 10, b * 7 // 10))
        _draw_shape(draw, thing, scale, -0.7, 0, (r, g, b))
    for sign in _signs(scene):
        _draw_sign(paper, draw, sign, scale)
    picture = paper.reduce(OVERSAMPLING)
    return picture if natural == wanted else picture.resize(wanted[::-1], Image.Resampling.BICUBIC)


def _draw_sign(paper, draw, sign, scale):
    board, rim, ink = _SIGN_STYLES[sign.style]
    (left, top, right, bottom), boxes = _sign_boxes(sign)
    for grow, shift, fill in ((0.0, 1.2, _SHADOW), (0.0, 0.0, rim), (-0.9, 0.0, board)):
        box = [(edge + shift + side * grow) * scale for edge, side in ((left, -1), (top, -1), (right, 1), (bottom, 1))]
        draw.rounded_rectangle(box, radius=(2.4 + grow) * scale, fill=fill)
    for letter, (x, y, x_end, y_end) in zip(sign.text, boxes, strict=True):
        mask = _glyph(letter, round((y_end - y) * scale), round((x_end - x) * scale))
        paper.paste(ink, (round(x * scale), round(y * scale)), mask)


def middles(scene: Scene) -> list[tuple[float, float, str, str]]:
    """(y, x) in units of the middle of every thing, sign and letter, its name ("small red star", "sign", "A") and its
    place on the poster, "" for a letter."""
    found = [(t.y, t.x, f"{t.size} {t.colour} {t.shape}", t.place) for t in scene.things]
    for sign in _signs(scene):
        found.append((sign.y, sign.x, "sign", sign.place))
        boxes = zip(sign.text, _sign_boxes(sign)[1], strict=True)
        found += [(sign.y, (left + right) / 2, letter, "") for letter, (left, _, right, _) in boxes]
    return found


def label_map(scene: Scene, height: int | None = None, width: int | None = None) -> np.ndarray:
    """What is where: uint8 (height, width), an index into CLASS_NAMES per pixel of `render(scene, height, width)`. A
    letter's label fills its box and a third of the gap on either side, I's nearly half: it would hardly be seen."""
    scale, natural, wanted = _sizes(scene, height, width)
    labels = Image.new("L", natural[::-1])
    draw = ImageDraw.Draw(labels)
    for thing in scene.things:
        _draw_shape(draw, thing, scale, 0.4, 0, _CLASS[f"{thing.colour} {thing.shape}"])
    for sign in _signs(scene):
        board, boxes = _sign_boxes(sign)
        for name, (left, top, right, bottom) in (("sign", board), *zip(sign.text, boxes, strict=True)):
            margin = 0 if name == "sign" else max(GAP / 3, (I_WIDTH - (right - left)) / 2)
            box = left - margin, top, right + margin - 1 / scale, bottom - 1 / scale  # PIL draws the last pixel, too
            draw.rectangle([round(edge * scale) for edge in box], fill=_CLASS[name])
    return np.asarray(labels if natural == wanted else labels.resize(wanted[::-1], Image.Resampling.NEAREST))
