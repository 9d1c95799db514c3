"""What a picture of the demo world holds, as data: drawn from a seed, not yet drawn on paper.

A scene is a poster with one to five coloured shapes and, in about half of them, a sign with a short word or a number.
Everything stands in its own cell of a small grid, off the cell's middle by a random bit, so that nothing overlaps and a
place has one name.

Lengths are in *units*: the longer side of every poster is 144 units. This file makes no pictures (`draw.py`) and asks
nothing (`questions.py`); a moving scene would be a function from a time to a `Scene`.
"""

from dataclasses import dataclass

import numpy as np

LONG_SIDE = 144  # units; as many pixels as the demo models' largest canvas has, so one unit is one pixel there
LETTER_HEIGHT = 10.3  # units, with Q's tail; less than five pixels without it, once a poster is squashed to 72 × 72
SIGN_HEIGHT = 17.0  # units
CLEAR_OF_MIDDLE = 6.5  # units that a sign's middle keeps from the poster's middle line

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SHAPES = ("circle", "square", "triangle", "star", "heart")
COLOURS = {
    "red": (222, 49, 54),
    "orange": (246, 134, 30),
    "yellow": (252, 216, 48),
    "green": (52, 160, 82),
    "blue": (44, 105, 212),
    "purple": (128, 66, 178),
    "pink": (247, 136, 190),
}
RADII = {"small": (11.0, 12.2), "large": (18.0, 19.5)}  # units, from and to
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
LAYOUTS = (  # (height, width) in units, (rows, columns), how often
    ((144, 144), (3, 3), 0.45),
    ((144, 144), (2, 2), 0.15),
    ((108, 144), (2, 3), 0.20),
    ((144, 108), (3, 2), 0.20),
)

TRAIN_SEEDS = range(0, 1_000_000_000)
HELD_OUT_SEEDS = range(1_000_000_000, 1_001_000_000)

_WORDS = """ANT APE ARM ART BAG BAT BED BEE BELL BIKE BIRD BOAT BOLD BONE BOOK BOOT BOWL BOX BOY BREAD BUS CAFE CAKE
    CALF CALL CAR CARD CAT CAVE CHEF CITY CLAY CLUB COAT COLD COOK COOL CORN COW CUP DAY DEEP DEER DESK DISH DOG
    DOLL DOOR DOVE DRUM DUCK DUST EAST EGG EXIT EYE FACE FAIR FARM FAST FERRY FIELD FIRE FISH FIVE FLAG FLY FOG FOOD
    FOOT FORK FOX FREE FROG FRUIT FULL GAME GIFT GIRL GOAT GOLD GOOD GRASS GREY HAIR HALL HAND HAPPY HAT HAWK HELLO
    HELP HERO HILL HOP HORSE HOT HOTEL ICE INK IRON JAZZ JOB JOY JUICE JUMP KEY KID KING KITE LADY LAKE LAMP LAND
    LEFT LEG LIFE LION LIP LOUD LOVE LUCK MAP MARS MAZE MILK MINT MIX NEST NET NEWS NICE NIGHT NINE NOSE NUT OAK OIL
    OPEN OWL PARK PATH PEN PIANO PIE PIG PILOT PINE PLAY POET POND PUB QUEEN QUIET QUIZ RAIN RICE RIVER ROAD ROBOT
    ROCK ROOF ROSE SALT SAND SEA SEED SHARK SHIP SHOE SHOP SILK SIX SKY SNOW SOAP SOCK SOFA SONG SOUP SPACE STAR
    STOP SUN TAXI TEA TENT TIGER TOAD TOY TRAIN TREE TULIP TWO VAN VASE WALK WAX WEST WIND WOLF YARD YES ZEBRA ZERO
    ZOO"""
_HELD_OUT_WORDS = """BABY BEAR BLUE CLOUD COIN CROW DANCE DUNE EAGLE ECHO FERN FIG GATE GLASS HOME IDEA ISLE JADE
    KIWI LEAF LEMON LILY MOON NORTH OCEAN PEAR PLUM POOL QUILT RAFT RING SAIL SOUTH TAIL TOWN TUBA VINE WAVE WOOD YOGA
    ZINC"""
WORDS = tuple(_WORDS.split())
HELD_OUT_WORDS = tuple(_HELD_OUT_WORDS.split())  # on no sign of TRAIN_SEEDS


@dataclass(frozen=True)
class Thing:
    """One shape: `y`, `x` (its middle) and `radius` (of the circle around it) in units, `angle` in degrees."""

    shape: str
    colour: str
    size: str
    place: str
    y: float
    x: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Sign:
    """A board with `text` written on it, its middle at `y`, `x` in units; `style` numbers its colours."""

    text: str
    place: str
    y: float
    x: float
    style: int


@dataclass(frozen=True)
class Scene:
    """A poster of (`height`, `width`) units; `places` names its cells, row by row, where `things` and `sign` are."""

    height: int
    width: int
    places: tuple[str, ...]
    things: tuple[Thing, ...]
    sign: Sign | None
    backdrop: tuple[int, int]  # palette, pattern
    small_print: tuple[Sign, ...] = ()  # more signs, which no question is about


def letter_page(seed: int) -> Scene:
    """Nothing but rows of random letters and digits: a page to learn reading from, before any question is asked."""
    rng = np.random.default_rng((seed, 3))
    signs = []
    for y in np.arange(10.0, LONG_SIDE - 10, SIGN_HEIGHT + 1) + rng.uniform(-1.0, 8.0):
        text = "".join(rng.choice(list(LETTERS), size=13))
        signs.append(Sign(text, "", round(float(y), 2), round(float(rng.uniform(62, 82)), 2), int(rng.integers(3))))
    backdrop = (int(rng.integers(8)), int(rng.integers(3)))
    return Scene(LONG_SIDE, LONG_SIDE, (), (), None, backdrop, tuple(signs))


def draw_scene(seed: int) -> Scene:
    """The scene number `seed`, the same on every machine.

    Half of the words on signs of HELD_OUT_SEEDS are on no sign of TRAIN_SEEDS; half of the words there are strings of
    random letters. So reading cannot become remembering.
    """
    rng = np.random.default_rng(seed)
    (height, width), (rows, columns), _ = LAYOUTS[rng.choice(len(LAYOUTS), p=[often for *_, often in LAYOUTS])]
    cells = [int(i) for i in rng.permutation(rows * columns)]
    num_things = min(1 + int(rng.choice(5, p=(0.12, 0.18, 0.24, 0.26, 0.20))), len(cells) - 1)

    sign = None
    if rng.random() < 0.5:
        text = _sign_text(rng, held_out=seed in HELD_OUT_SEEDS)
        y, x = _point_in_cell(rng, (height, width), (rows, columns), cells[num_things], SIGN_HEIGHT / 2 + 1, 23.5)
        if abs(y - height / 2) < CLEAR_OF_MIDDLE:  # two tiles meet there, and a letter cut in half cannot be read
            y = height / 2 + (CLEAR_OF_MIDDLE if y > height / 2 else -CLEAR_OF_MIDDLE)
        sign = Sign(text, _place(cells[num_things], rows, columns), y, x, int(rng.integers(3)))

    # Half of the scenes draw from few shapes and colours: without repetition there would be nothing to count.
    few = rng.random() < 0.5
    shapes = rng.permutation(SHAPES)[: 2 if few else len(SHAPES)]
    colours = rng.permutation(list(COLOURS))[: 3 if few else len(COLOURS)]
    things = []
    for cell in sorted(cells[:num_things]):
        shape, colour, size = str(rng.choice(shapes)), str(rng.choice(colours)), str(rng.choice(list(RADII)))
        radius = round(float(rng.uniform(*RADII[size])), 2)
        y, x = _point_in_cell(rng, (height, width), (rows, columns), cell, radius + 2, radius + 2)
        angle = round(float(rng.uniform(-18, 18)), 1)
        things.append(Thing(shape, colour, size, _place(cell, rows, columns), y, x, radius, angle))

    places = tuple(_place(cell, rows, columns) for cell in range(rows * columns))
    return Scene(height, width, places, tuple(things), sign, (int(rng.integers(8)), int(rng.integers(3))))


def _place(cell, rows, columns):
    row, column = divmod(cell, columns)
    return PLACES[row if rows == 3 else 2 * row][column if columns == 3 else 2 * column]


def _point_in_cell(rng, size, grid, cell, half_height, half_width):
    """(y, x): a random middle for something of the given half sizes within its cell, near the cell's own middle."""
    point = []
    for length, n, i, half in zip(size, grid, divmod(cell, grid[1]), (half_height, half_width), strict=True):
        slack = max(0.0, min(length / n / 2 - half, 12.0))
        point.append(round(float(length / n * (i + 0.5) + rng.uniform(-slack, slack)), 2))
    return tuple(point)


def _sign_text(rng, held_out):
    if rng.random() < 0.35:
        return str(rng.integers(10, 100) if rng.random() < 0.5 else rng.integers(100, 1000))
    if held_out:
        return str(rng.choice(HELD_OUT_WORDS if rng.random() < 0.5 else WORDS))
    if rng.random() < 0.5:
        return str(rng.choice(WORDS))
    while True:
        word = "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), size=rng.integers(3, 6)))
        wide = sum(word.count(letter) for letter in "MWOGQ")  # a sign must fit its cell
        if word not in HELD_OUT_WORDS and (len(word) < 5 or wide < 2):
            return word
