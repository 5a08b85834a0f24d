"""What captions of the data set `digits` say: statements, the words for them, and the scenes of which they are true.

A caption begins as a `Statement`. `words_for` turns that into English and `SceneTable.true_scenes` into the list of
scenes it is true of, so words and truth cannot disagree. Some of a scene is left unsaid on purpose: a statement may be
true of many scenes, and a scene makes many statements true.

    Mention    at least one digit like this: "a large red three", "a blue digit in the top left corner"
    mentions   several mentions stand for as many different digits
    relation   holds between the last two mentions: "a white one, and a red three above a green seven"
    tally      exactly so many digits like this: "two yellow digits and a red five", "three digits including ..."
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from setwise.pipelines.digit_scenes import APART_LIMIT, BAND_LIMITS, MAX_DIGITS, Digit, Scene, stream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CAPTIONS_PER_SCENE = 5
MIN_WORDS, MAX_WORDS = 4, 14

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE_WORDS = {"small": ("small", "small", "tiny"), "large": ("large", "big")}
# A place is the band of the horizontal axis and the band of the vertical one (0 first, 1 middle, 2 last, None any).
PLACES: dict[str, tuple[int | None, int | None]] = {
    "left": (0, None),
    "right": (2, None),
    "top": (None, 0),
    "bottom": (None, 2),
    "centre": (1, 1),
    "top left": (0, 0),
    "top right": (2, 0),
    "bottom left": (0, 2),
    "bottom right": (2, 2),
}
PLACE_WORDS = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "centre": ("in the centre", "in the middle"),
    "top left": ("in the top left corner", "in the upper left corner", "at the top left"),
    "top right": ("in the top right corner", "in the upper right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "in the lower right corner", "at the bottom right"),
}
# A relation compares the centres along an axis (0 across, 1 down); -1: the first of the two has the lower coordinate.
RELATIONS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "beneath", "under"),
}
OPENINGS = ("a picture of", "an image of")


@dataclass(frozen=True, slots=True)
class Mention:
    """One digit as far as a caption describes it; what is None goes unsaid and may be anything."""

    value: int | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """Exactly `number` of the scene's digits are of this kind."""

    number: int
    kind: Mention


@dataclass(frozen=True, slots=True)
class Statement:
    mentions: tuple[Mention, ...]
    relation: str | None = None
    tally: Tally | None = None


@dataclass(frozen=True, slots=True)
class Caption:
    text: str
    statement: Statement

    @property
    def tokens(self) -> list[str]:
        return self.text.replace(",", "").split()


def bands(digit: Digit, side: int) -> tuple[int, int]:
    """The thirds (roughly) of the image, across and down, in which the digit's centre lies."""
    across, down = (sum(at > limit for limit in BAND_LIMITS) for at in digit.centre(side))
    return across, down


class SceneTable:
    """Scenes as arrays, to ask of many statements which of the scenes they are true of.

    A set of a scene's digits is one byte, bit d for digit d, so a question to all scenes is a few operations on one
    byte a scene. Shape suffixes: N scenes, D digits of a scene. Truth rests on the limits of digit_scenes, which no
    scene comes near.
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        import numpy as np

        self._with_N: dict[tuple[str, object], NDArray[np.uint8]] = {}
        centre_2ND = np.full((2, len(scenes), MAX_DIGITS), np.nan)  # where no digit is, no comparison holds
        for n, scene in enumerate(scenes):
            for d, digit in enumerate(scene.digits):
                centre_2ND[:, n, d] = digit.centre(scene.side)
                across, down = bands(digit, scene.side)
                for trait in (
                    ("exists", True),
                    ("value", digit.value),
                    ("colour", digit.colour),
                    ("size", digit.size),
                    ("across", across),
                    ("down", down),
                ):
                    self._with_N.setdefault(trait, np.zeros(len(scenes), dtype=np.uint8))[n] |= 1 << d
        self._none_N = np.zeros(len(scenes), dtype=np.uint8)
        # related[name][n, i, j]: in scene n, digit i stands in this relation to digit j.
        self._related_NDD = {
            name: sign * (centre_2ND[axis, :, :, None] - centre_2ND[axis, :, None, :]) > APART_LIMIT
            for name, (axis, sign) in RELATIONS.items()
        }

    def _fitting(self, mention: Mention) -> NDArray[np.uint8]:
        """For each scene the set of its digits that are as the mention says."""
        across, down = PLACES[mention.place] if mention.place else (None, None)
        traits = {
            "value": mention.value,
            "colour": mention.colour,
            "size": mention.size,
            "across": across,
            "down": down,
        }
        fitting_N = self._with_N[("exists", True)]
        for trait in traits.items():
            if trait[1] is not None:
                fitting_N = fitting_N & self._with_N.get(trait, self._none_N)
        return fitting_N

    def true_scenes(self, statement: Statement) -> NDArray[np.int64]:
        """The positions of the scenes of which the statement is true, ascending."""
        import numpy as np

        fitting = [self._fitting(mention) for mention in statement.mentions]
        possible_N = np.logical_and.reduce(fitting)
        if statement.tally is not None:
            possible_N &= np.bitwise_count(self._fitting(statement.tally.kind)) == statement.tally.number
        candidates: NDArray[np.int64] = np.flatnonzero(possible_N)
        if len(fitting) == 1:
            return candidates
        # Few scenes have something for each mention; only in those need the mentions be dealt to different digits.
        fits = [[(sets[candidates] >> d) & 1 for d in range(MAX_DIGITS)] for sets in fitting]
        true = np.zeros(len(candidates), dtype=bool)
        for dealt in itertools.permutations(range(MAX_DIGITS), len(fits)):
            holds = functools.reduce(np.logical_and, (fit[d] for fit, d in zip(fits, dealt, strict=True)))
            if statement.relation is not None:
                holds = holds & self._related_NDD[statement.relation][candidates, dealt[-2], dealt[-1]]
            true |= holds
        return candidates[true]


def write_captions(scene: Scene, seed: int) -> tuple[Caption, ...]:
    """Five different statements that are true of the scene; one may say in other words what another says."""
    rng = stream(seed, scene.split, scene.index, "captions")
    captions: dict[Statement, Caption] = {}
    left = dict.fromkeys(_FORMS, 2)  # no form more than twice: five captions should look at a scene from several sides
    while len(captions) < CAPTIONS_PER_SCENE:
        form = rng.choices(list(_FORMS), list(_FORMS.values()))[0]
        statement = _observe(form, scene, rng) if left[form] else None
        if statement is None or statement in captions:
            continue
        caption = Caption(words_for(statement, rng), statement)
        if MIN_WORDS <= len(caption.tokens) <= MAX_WORDS:
            captions[statement] = caption
            left[form] -= 1
    return tuple(captions.values())


# How often each form of statement is tried; one that the scene does not offer is drawn again. The weights are set so
# that about a third of the captions of 1,000 scenes are true of more than one of them.
_FORMS = {
    "one": 3,
    "two": 12,
    "relation": 38,
    "three": 30,
    "one and relation": 32,
    "tally of a kind": 10,
    "tally of all": 4,
}


def _observe(form: str, scene: Scene, rng: random.Random) -> Statement | None:
    """Something true of the scene, said in this form; None where the digits that were looked at do not offer it."""
    side = scene.side
    digits = rng.sample(scene.digits, len(scene.digits))
    if form == "one":
        return Statement((_mention(digits[0], side, rng, place=True, size=True, vague=False),))
    if form == "two":
        # A place after the last of several digits could be meant for all of them: it needs a place on each.
        places = rng.choice(((False, False), (True, False), (True, True)))
        pair = zip(digits[:2], places, strict=True)
        return Statement(tuple(_mention(digit, side, rng, place=place) for digit, place in pair))
    if form == "three" and len(digits) >= 3:
        return Statement(tuple(_mention(digit, side, rng) for digit in digits[:3]))
    if form == "relation" or (form == "one and relation" and len(digits) >= 3):
        named = digits[:2] if form == "relation" else digits[:3]
        relation = _relation(named[-2], named[-1], side)
        return Statement(tuple(_mention(digit, side, rng) for digit in named), relation) if relation else None
    if form == "tally of all":
        example = _mention(digits[0], side, rng, place=True, size=True)
        return Statement((example,), tally=Tally(len(digits), Mention()))
    if form == "tally of a kind":
        first = digits[0]
        by_colour = rng.random() < 0.7
        kind = Mention(colour=first.colour) if by_colour else Mention(size=first.size)
        alike = [d for d in digits if (d.colour == first.colour if by_colour else d.size == first.size)]
        others = [d for d in digits if d not in alike]
        if len(alike) >= 2 and others:
            # The other digit says how it differs, so that nobody can take it for one of those counted.
            other = _mention(others[0], side, rng, size=not by_colour, vague=False)
            return Statement((other,), tally=Tally(len(alike), kind))
    return None


def _mention(
    digit: Digit, side: int, rng: random.Random, *, place: bool = False, size: bool | None = None, vague: bool = True
) -> Mention:
    """The digit by value and colour, with its place and size as asked; a vague one may lack its value or its colour."""
    unsaid = rng.choices(("nothing", "value", "colour"), (92, 3, 5))[0] if vague else "nothing"
    return Mention(
        value=None if unsaid == "value" else digit.value,
        colour=None if unsaid == "colour" else digit.colour,
        size=digit.size if (rng.random() < 0.75 if size is None else size) else None,
        place=_place(digit, side) if place else None,
    )


def _place(digit: Digit, side: int) -> str:
    """The narrowest place that holds the digit's centre."""
    across, down = bands(digit, side)
    names = {bands_of: name for name, bands_of in PLACES.items()}
    for wanted in ((across, down), (across, None), (None, down)):
        if wanted in names:
            return names[wanted]
    raise AssertionError(f"no place holds the bands {across}, {down}")


def _relation(first: Digit, second: Digit, side: int) -> str | None:
    """How the first stands to the second along the axis on which they are further apart; None if near on both."""
    offset = [here - there for here, there in zip(first.centre(side), second.centre(side), strict=True)]
    axis = 0 if abs(offset[0]) > abs(offset[1]) else 1
    if abs(offset[axis]) <= APART_LIMIT:
        return None
    sign = 1 if offset[axis] > 0 else -1
    return next(name for name, direction in RELATIONS.items() if direction == (axis, sign))


def words_for(statement: Statement, rng: random.Random) -> str:
    """The statement in English; synonyms and openings are drawn, the meaning is not."""
    *others, last = (_noun_phrase(mention, rng) for mention in statement.mentions)
    opening = rng.choice((*OPENINGS, "there is", "", "", ""))
    if statement.tally is not None:
        kind = statement.tally.kind
        said = [NUMERALS[statement.tally.number], _size_word(kind, rng), kind.colour, rng.choice(("digits", "numbers"))]
        counted = " ".join(word for word in said if word)
        text = f"{counted} {'including' if kind == Mention() else 'and'} {last}"
        opening = opening if opening in OPENINGS else ""  # "there is" does not go with a plural
    elif statement.relation is not None:
        *others, first = others
        text = f"{first} {rng.choice(RELATION_WORDS[statement.relation])} {last}"
        text = f"{others[0]}, and {text}" if others else text
    elif others:
        text = f"{', '.join(others)} and {last}"
    else:
        text = last
    return f"{opening} {text}".strip()


def _size_word(mention: Mention, rng: random.Random) -> str | None:
    return rng.choice(SIZE_WORDS[mention.size]) if mention.size else None


def _noun_phrase(mention: Mention, rng: random.Random) -> str:
    if mention.value is None:
        noun = rng.choice(("digit", "number"))
    else:
        # "A red one" would leave open what it is one of.
        prefix = "number " if mention.value == 1 else rng.choice(("", "", "", "number "))
        noun = prefix + NUMERALS[mention.value]
    words = " ".join(word for word in (_size_word(mention, rng), mention.colour, noun) if word)
    article = "an" if words.startswith("eight") else "a"
    place = " " + rng.choice(PLACE_WORDS[mention.place]) if mention.place else ""
    return f"{article} {words}{place}"
