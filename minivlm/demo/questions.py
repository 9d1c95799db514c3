"""What can be asked about a scene, and the one right answer: a short phrase in a fixed form, judged by exact match.

Six kinds: `count`, `exists`, `find`, `compare`, `describe`, `read`. Nothing is asked that the picture leaves open:
never where "the red circle" is when there are two, never about a place that the poster's grid does not have.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from minivlm.demo.scene import COLOURS, PLACES, SHAPES, Scene, Thing

KINDS = ("count", "exists", "find", "compare", "describe", "read")
NUMBERS = ("none", "one", "two", "three", "four", "five")
COLUMN = {place: i for row in PLACES for i, place in enumerate(row)}
ROW = {place: i for i, row in enumerate(PLACES) for place in row}

_READ = ("What does the sign say?", "Read the sign.", "What is written on the sign?")
TEMPLATES = {
    "count": ("How many {many} are there?", "How many {many} do you see?", "Count the {many}."),
    "exists": ("Is there {a}?", "Do you see {a}?", "Is there {a} in the picture?", "Can you find {a}?"),
    "what is at": ("What is {at}?", "What do you see {at}?", "Which thing is {at}?"),
    "where": ("Where is the {it}?", "Where do you see the {it}?", "In which place is the {it}?"),
    "colour": ("What colour is the {it}?", "Which colour does the {it} have?", "Name the colour of the {it}."),
    "shape": ("Which shape is {colour}?", "What is the {colour} shape?", "What kind of shape is the {colour} one?"),
    "size": ("Is the {it} small or large?", "How big is the {it}?", "What size is the {it}?"),
    "larger": ("Which is larger, the {one} or the {two}?", "Which is bigger, the {one} or the {two}?"),
    "smaller": ("Which is smaller, the {one} or the {two}?", "Which is the smaller one, the {one} or the {two}?"),
    "relation": ("Is the {one} {relation} the {two}?", "Do you see the {one} {relation} the {two}?"),
    "more": ("Are there more {one} than {two}?", "Do you see more {one} than {two}?"),
    "describe": ("Describe the picture.", "What is in the picture?", "What do you see?", "Describe what you see."),
    "read word": (*_READ, "Which word is on the sign?", "What is the word on the sign?"),
    "read number": (*_READ, "Which number is on the sign?", "What is the number on the sign?"),
}


@dataclass(frozen=True)
class Question:
    """`kind` is one of KINDS; `answer` is the only right one."""

    kind: str
    question: str
    answer: str


def at(place: str) -> str:
    """ "in the centre", "on the left", "at the top left"."""
    if place == "centre":
        return "in the centre"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def describe(scene: Scene) -> str:
    """The canonical sentence: every shape, in reading order, then the sign. It says where before it says what, so that
    whoever writes it word by word knows by then where to look."""
    parts = [f"{at(thing.place)} {a(f'{thing.size} {thing.colour} {thing.shape}')}" for thing in scene.things]
    if scene.sign:
        parts.append(f"{at(scene.sign.place)} a sign that says {scene.sign.text}")
    text = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return text[0].upper() + text[1:] + "."


def questions(scene: Scene, seed: int) -> list[Question]:
    """Ten to twenty questions, of every kind that makes sense for the scene; targets and phrasing are drawn from
    `seed`. Yes and no are equally likely wherever the scene allows both."""
    asker = _Asker(scene, np.random.default_rng((seed, 1)))
    asker.count(), asker.exists(), asker.find(), asker.compare()
    asker.ask("describe", "describe", describe(scene))
    if scene.sign:
        text = scene.sign.text
        asker.ask("read", "read number" if text.isdigit() else "read word", text)
    return asker.asked


def _matches(things, colour="", shape=""):
    return [thing for thing in things if colour in ("", thing.colour) and shape in ("", thing.shape)]


def _names(thing: Thing):
    """What the thing can be called, from short to long."""
    return f"{thing.colour} shape", thing.shape, f"{thing.colour} {thing.shape}"


class _Asker:
    def __init__(self, scene: Scene, rng: np.random.Generator):
        self.scene, self.rng, self.asked = scene, rng, []
        all_names = [name for thing in scene.things for name in _names(thing)]
        # The names of each thing that fit it alone; things without one are never asked about.
        own_names = [(thing, [name for name in _names(thing) if all_names.count(name) == 1]) for thing in scene.things]
        self.unique = [(thing, names) for thing, names in own_names if names]

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p):
        return self.rng.random() < p

    def ask(self, kind, template, answer, **blanks):
        self.asked.append(Question(kind, self.pick(TEMPLATES[template]).format(**blanks), answer))

    def pick_unique(self, allowed=None):
        """A thing and a name (of the allowed ones) that fits no other thing, or None."""
        pairs = [(thing, name) for thing, names in self.unique for name in names if not allowed or name in allowed]
        return self.pick(pairs) if pairs else None

    def count(self):
        things = self.scene.things
        self.ask("count", "count", NUMBERS[len(things)], many="shapes")
        for colour_too, shape_too in ((True, False), (False, True), (True, True)):
            if self.chance(0.8):  # something that is there, the repeated more often
                thing = self.pick(things)
                colour, shape = thing.colour if colour_too else "", thing.shape if shape_too else ""
            else:
                colour, shape = self.pick(list(COLOURS)) if colour_too else "", self.pick(SHAPES) if shape_too else ""
            many = " ".join(word for word in (colour, f"{shape or 'shape'}s") if word)
            self.ask("count", "count", NUMBERS[len(_matches(things, colour, shape))], many=many)

    def exists(self):
        things = self.scene.things
        for colour_too, shape_too in ((True, False), (False, True), (True, True)):
            pairs = [(c, s) for c in (COLOURS if colour_too else ("",)) for s in (SHAPES if shape_too else ("",))]
            there = [pair for pair in pairs if _matches(things, *pair)]
            missing = [pair for pair in pairs if pair not in there]
            if colour_too and shape_too and self.chance(0.7):  # a hard no: its colour and its shape are there, apart
                missing = [(c, s) for c, s in missing if _matches(things, c) and _matches(things, "", s)] or missing
            if self.chance(0.5) or not missing:
                answer, (colour, shape) = "yes", self.pick(there)
            else:
                answer, (colour, shape) = "no", self.pick(missing)
            self.ask("exists", "exists", answer, a=a(" ".join(word for word in (colour, shape or "shape") if word)))
        self.ask("exists", "exists", "yes" if self.scene.sign else "no", a="a sign")

    def find(self):
        scene = self.scene
        taken = {thing.place: a(f"{thing.colour} {thing.shape}") for thing in scene.things}
        if scene.sign:
            taken[scene.sign.place] = "a sign"
        free = [place for place in scene.places if place not in taken]
        first, *rest = (str(place) for place in self.rng.permutation(list(taken)))
        second = self.pick(free) if not rest or (free and self.chance(0.3)) else rest[0]
        for place in (first, second):
            self.ask("find", "what is at", taken.get(place, "nothing"), at=at(place))
        by_colour = [f"{colour} shape" for colour in COLOURS]
        for template, allowed in (("where", None), ("colour", SHAPES), ("shape", by_colour), ("size", None)):
            if picked := self.pick_unique(allowed):
                thing, name = picked
                answer = {"where": at(thing.place), "colour": thing.colour, "shape": a(thing.shape), "size": thing.size}
                self.ask("find", template, answer[template], it=name, colour=thing.colour)
        if scene.sign and self.chance(0.5):
            self.ask("find", "where", at(scene.sign.place), it="sign")

    def compare(self):
        things = self.scene.things
        order = [self.unique[i] for i in self.rng.permutation(len(self.unique))]
        pairs = [(x, self.pick(xs), y, self.pick(ys)) for x, xs in order for y, ys in order if x is not y]
        sizes = [pair for pair in pairs if pair[0].size != pair[2].size]
        if sizes:
            x, x_name, y, y_name = self.pick(sizes)
            template = self.pick(("larger", "smaller"))
            right = x_name if (x.size == "large") == (template == "larger") else y_name
            self.ask("compare", template, f"the {right}", one=x_name, two=y_name)
        for relations, order_of in ((("left of", "right of"), COLUMN), (("above", "below"), ROW)):
            apart = [pair for pair in pairs if order_of[pair[0].place] != order_of[pair[2].place]]
            if apart:
                x, x_name, y, y_name = self.pick(apart)
                relation = self.pick(relations)
                yes = (order_of[x.place] < order_of[y.place]) == (relation in ("left of", "above"))
                self.ask("compare", "relation", "yes" if yes else "no", one=x_name, two=y_name, relation=relation)
        yes = self.chance(0.5)
        ways = []
        for field, values, ending in (("shape", SHAPES, "s"), ("colour", tuple(COLOURS), " shapes")):
            number = {value: len(_matches(things, **{field: value})) for value in values}
            for one, two in permutations(values, 2):
                if number[one] + number[two] and (number[one] > number[two]) == yes:
                    ways.append((f"{one}{ending}", f"{two}{ending}", number[one] and number[two]))
        close = [way for way in ways if way[2]]  # both are there: looking for one of them is not enough
        one, two, _ = self.pick(close if close and self.chance(0.5) else ways)
        self.ask("compare", "more", "yes" if yes else "no", one=one, two=two)
