# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Writes English captions of DiceBear's avatars from the options that drew them, for examples/make_avatars.py."""

import re
from collections import defaultdict
from functools import lru_cache

import numpy as np


# For each style: its subject, then "component: phrase" for avatars that have the component. Braces stand for the words
# for its variant, for the name of a colour, or for {a}, the article before a singular. Components that are often
# hidden or hardly visible, such as earrings behind hair, are only in the column `attributes`.
STYLES = {
    "pixel-art": "a pixel-art portrait | skin: {skinColor} skin | hair: {hair} {hairColor} hair | mouth: a {mouth} "
    "mouth | clothing: {clothingColor} clothes | glasses: {glassesColor} glasses | hat: a {hatColor} hat",
    "lorelei": "a black-and-white drawing of a head | mouth: a {mouth} mouth | glasses: glasses | beard: a beard | "
    "freckles: freckles | hairAccessories: flowers in the hair",
    "notionists": "a black-and-white drawing of a person | glasses: glasses | beard: facial hair | gesture: {gesture}",
    "open-peeps": "a hand-drawn bust | skin: {skinColor} skin | head: {head} {hue} hair | "
    "expression: a {expression} expression | facialHair: a {facialHair} | accessories: {accessories} | "
    "mask: a {mask} | clothing: a {clothingColor} top",
    "cutouts": "a {head_shape} face cut out of {paperFaceColor} paper | hair: {paperHairColor} paper hair | "
    "eyes: {eyes} eyes | nose: a {nose} nose | mouth: a {mouth} mouth",
    "moods": "a {face_shape} {faceColor} smiley | eyes: {eyes} eyes | mouth: a {mouth} mouth",
    "clay": "a {body_shape} {bodyColor} clay creature | top: {a}{top} on its head | eyes: {eyes} eyes | "
    "mouth: a {mouth} mouth | pattern: {a}{pattern} on its belly",
    "critters": "a {body_shape} {bodyColor} monster | top: {a}{accentColor} {top} on its head | eyes: {eyes} eyes | "
    "mouth: a {mouth} mouth",
    "sprouts": "a {potColor} plant pot | plant: {a}{plantColor} {plant} | bloom: {bloomColor} blossom | "
    "eyes: {eyes} eyes | mouth: a {mouth} mouth",
    "planets": "a {planetColor} planet | surface: a {surface} surface | ring: a {ring} ring | moons: {moons} moons | "
    "background: in a starry {backgroundColor} sky",
    "landscape": "a landscape | orb: {a}{orbColor} {orb} | hill4: {hill4Color} hills in front of {hill1Color} ones | "
    "background: under a {backgroundColor} sky",
    "voxel-art": "a voxel figure | skin: {skinColor} skin | top: {top} {hue} hair | beard: a {beard} | "
    "eyes: {eyes} eyes | glasses: {glasses} glasses | mouth: a {mouth} mouth | outfit: a {shirtColor} {outfit} | "
    "shoes: {shoesColor} shoes",
    "thumbs": "a {shapeColor} thumb | eyes: {eyes} eyes | mouth: a {mouth} mouth",
    "pixelbot": "a robot face of {glowColor} lights | eyes: {eyes} eyes | mouth: a {mouth} mouth | "
    "background: on a {backgroundColor} screen",
    "gaze": "a {bodyColor} {shape} | eyes: {eyes} eyes",
    "marbles": "a marble of {sphereColor}, {blendColor} and {tintColor} | top: {a}{top} on top | eyes: {eyes} eyes | "
    "nose: a {nose} nose | mouth: a {mouth} mouth",
    "stack": "a stack of {piles} {stone_shape} stones | cap: a {cap_shape} stone on top | "
    "stoneMid: tones of {stoneLightColor}, {stoneMidColor} and {stoneDeepColor}",
    "cameo": "a plain {shape_shape} {bodyColor} face | hair: {shadeColor} {hair} | knot: {a}{knot} | "
    "mouth: a {mouth} mouth",
    "glass": "a soft blur as behind frosted glass | background: in {backgroundColor}",
    "blobs": "{body} translucent {blobColor} blobs on top of each other",
}
# Variants whose names (~) are not good words: "components, or a style and a component: variants > words". With
# "variants = phrase", the phrase replaces the one above.
WORDS = """
body/face/head: wide/tall/slanted/round/oval/squat > ~, circle > round, lean > leaning, tilt > tilted, peak > peaked
body/face/head: soft square > square, wedge inv > upside-down, steps > stepped, stack > two-part
cameo shape: wide/round/oval > ~, taper > tapered, jaw > broad-jawed
body/piles: duo/pair/boulder > two, trio/three/three wide/three lean/three belly > three
body/piles: quartet/tower/four/four lean/four belly > four, five > five
eyes: mono = one eye, mono sleepy = one sleepy eye, trio/three row = three eyes, dots/ink dots/bars = ~ for eyes
eyes: inward/outward/up/down = eyes that look ~, look up/look down = eyes that ~, look side/side = eyes that look aside
eyes: sideeye = eyes that look aside, pupils = round eyes, big pupils/tall pupils = eyes with ~, closed line > closed
eyes: close = eyes close together, circle square/pair = a round and a square eye, big small = a big and a small eye
eyes: ring dot = a ring and a dot for eyes, sleepy open = a closed and an open eye, squares/blocks > square
eyes: wink > winking, squint > squinting, grin > smiling, star > starry, beans > bean-shaped, sparkle/shine > shiny
thumbs eyes: variant01 > heart-shaped, variant02 > closed, variant03 > squinting, variant04 > happy, variant05 > oval
thumbs eyes: variant06 > tall, variant07 > narrow, variant08 > dot-like
mouth: smile/big smile/wide smile/tiny smile/grin/frown/smirk/pout = a ~, smile big = a big smile, wide = a wide smile
mouth: torn smile = a smile of torn paper, smile open = an open smile, beam = a broad smile, line/flat > straight
mouth: o/ooh > round, cat/cat mouth/uu > cat-like, teeth = bared teeth, tooth = one tooth, slant > slanted
mouth: tongue/blep/smile tongue = a tongue sticking out, laugh > laughing, gasp > gasping, open small > small open
mouth: dot/strip = a ~ for a mouth
thumbs mouth: variant01 = an open smile, variant02 = a big open smile, variant03 = a small smile, variant04 = a smile
thumbs mouth: variant05 > kissing
nose/glasses/accessories: hook > hooked, tick > short, dab > round, cat > cat-eye, shades = sunglasses, visor = a ~
nose/glasses/accessories: eyepatch = an eyepatch
beard/facialHair: full > full beard, chin > chin beard, stubble = stubble
open-peeps head/voxel-art top: afro/bob/bun/flat top/mohawk/ponytail = a {hue} ~, gray bun = a {hue} bun
open-peeps head/voxel-art top: bangs/braids/buns/cornrows/twin tails/twists = {hue} ~, dreads = {hue} dreadlocks
open-peeps head/voxel-art top: bantu knots = {hue} Bantu knots, pomp = a {hue} pompadour, no hair = a bald head
open-peeps head/voxel-art top: long afro = a big {hue} afro, flat top long = a tall {hue} flat top
open-peeps head/voxel-art top: bear = a bear's head, gray short > short, medium/gray medium > medium-length
open-peeps head/voxel-art top: medium straight > straight, bowl > bowl-cut, long bangs = long {hue} hair with bangs
open-peeps head/voxel-art top: medium bangs = {hue} hair with bangs, hat beanie = a {clothingColor} beanie
open-peeps head/voxel-art top: turban = a {clothingColor} ~, hijab = a black ~, hat hip = a black hat
open-peeps head/voxel-art top: cap/beanie = a {hatColor} ~, animal ears/bunny ears = a {hatColor} hat with ~
top: horns small > small horns, horns in > curved horns, ears round > round ears, ears pointy > pointed ears
top: ears droop > droopy ears, antennae > antennas
expression: angry with fang > angry, awe > awed, eating happy > happy, loving grin > loving, contempt > contemptuous
expression: concerned fear/fear > frightened, rage > enraged, old > aged, eyes closed = closed eyes, smile = a smile
expression: cyclops = a single eye, monster = three eyes, smile teeth gap = a gap-toothed smile
expression: smile big = a big smile, smile lol = tears of laughter
gesture: hand = a thumb up, hand phone = a phone in the hand, ok/ok long arm = an OK sign, point = a pointing finger
gesture: point long arm = a raised finger, wave long arm = a raised hand, wave long arms = two raised hands
gesture: wave ok long arms = a raised hand and an OK sign, wave point long arms = a raised hand and a raised finger
outfit: plain > shirt, stripes > striped shirt, tie > shirt with a tie, jacket/coat/dress/suit = a {jacketColor} ~
outfit: checker = a checkered jacket, overalls = {pantsColor} ~
pattern/plant: zig > zigzag, checker > checks, ball > ball cactus, tall > tall stem, grass > grass blades
surface/moons/orb: swirl > swirled, cap = a polar cap, terra = continents, one = one moon, tiny = a tiny moon
surface/moons/orb: ring > ring-shaped sun, glow > sun with a halo
cameo hair/knot: cap > cropped hair, part > parted hair, side > side-swept hair, wave > wavy hair, bowl > bowl-cut hair
cameo hair/knot: frame > framing hair, buns = two buns, tail > ponytail
"""
# Components that are not mentioned if one of these others is present, which may cover them or share their colour.
HIDDEN_BY = {"eyes": "glasses", "expression": "mask accessories", "facialHair": "mask", "head": "facialHair"}
COLORS = """
black 000000, black 181a1e, dark gray 404448, gray 909498, light gray d4d6dc, white ffffff, off-white f6f2ea
cream faf0d8, beige e8cfa8, tan c89868, brown 885030, brown 684820, dark brown 40241a, rust b84c10, maroon 58101c
dark red a01418, red e02830, coral f07868, pale pink fae4e0, light pink fcc4cc, light pink fca8d4, pink f488a8
hot pink e04888, magenta e048e0, peach fdd4b0, orange f48430, light orange fcb874, gold dca828, yellow fce050
pale yellow fcf4b4, olive 8c8830, dark olive 544c1c, lime a0e840, pale green d4ecd8, light green a8e4a0, green 48b050
green 508858, dark green 205838, sage 8cac88, mint 74e8b8, teal 148078, teal 0c5860, dark teal 043438
turquoise 40c8c0, light turquoise 90f0f0, pale blue dcf0ff, light blue b4dcf8, sky blue 60b4f0, blue 2868d0
navy 14285c, navy 101a34, slate blue 587898, dark slate blue 304468, indigo 4840d8, violet 7c40e0, purple 9848b0
dark purple 30104c, pale lavender ece0fc, lavender c8b4f4, light purple d89cf8, mauve a07898, plum 703c60
"""


def write_captions(style: str, chosen: dict[str, str], *, pick: int) -> dict[str, str]:
    """Writes a sentence in one of four phrasings, a short caption with one detail, and tags.

    Args:
        style: A key of `STYLES`.
        chosen: Variants by component and colours by name, such as {"mouth": "bigSmile", "skinColor": "#cb9e6e"}.
        pick: Any integer; it selects the phrasing and the detail.
    """
    subject, details, where = describe(style, chosen)
    listed = " and ".join(filter(None, [", ".join(details[:-1]), *details[-1:]]))
    having = f" with {listed}" if details else ""
    sentence = [
        f"{subject}{having}, {where}",
        f"{where}, {subject}{having}",
        f"{style} avatar: {subject} {where}{having}",
        f"{subject} {where}" + (f"; it has {listed}" if details else ""),
    ][pick % 4]
    short = f"{subject} with {details[pick // 4 % len(details)]}" if details else f"{subject} {where}"
    tags = ", ".join(re.sub("^an? ", "", tag) for tag in (style, subject, *details, where))
    return {"caption": sentence[0].upper() + sentence[1:] + ".", "caption_short": short, "caption_tags": tags}


def describe(style: str, chosen: dict[str, str]) -> tuple[str, list[str], str]:
    """Describes the subject, the details and the background of an avatar."""
    # Words for variants and colours.
    values, phrases = defaultdict(str), {}
    for key, value in chosen.items():
        if key.endswith("Color"):
            values[key] = name_skin(value) if key == "skinColor" else name_color(value)
            continue
        # "bigPupils" is "big pupils", "short07" is "short".
        plain = value if value.startswith("variant") else value.rstrip("0123456789")
        plain = re.sub("(?<=[a-z])(?=[A-Z])", " ", plain).lower()
        found = read_words().get((f"{style} {key}", plain)) or read_words().get((key, plain))
        values[key], is_phrase = found or (plain, False)
        values[f"{key}_shape"] = values[key] if found else f"{plain}-shaped"
        phrases |= {key: values[key]} if is_phrase else {}
    values["hue"] = values["headContrastColor"] or values["hairColor"] or "black"

    # Phrases for the components that are present, with these words filled in.
    subject, *details = STYLES[style].split(" | ")
    told = {"subject": subject, "background": "on a {backgroundColor} background"}
    for component, phrase in (detail.split(": ") for detail in details):
        hidden = any(other in chosen for other in HIDDEN_BY.get(component, "").split())
        if not hidden and (component in chosen or f"{component}Color" in chosen):
            told[component] = phrases.get(component, phrase)
    for component, phrase in told.items():
        values["a"] = "" if re.search("([^s]s| hair)$", values[component]) else "a "
        told[component] = re.sub(r"\ba (?=[aeio])", "an ", " ".join(phrase.format_map(values).split()))
    return told.pop("subject"), [told[key] for key in told if key != "background"], told["background"]


@lru_cache
def read_words() -> dict[tuple[str, str], tuple[str, bool]]:
    """Parses WORDS: words by component and variant, and whether they are a phrase."""
    words = {}
    for places, entries in (line.split(": ") for line in WORDS.strip().splitlines()):
        for variants, sign, text in re.findall("([^=>,]+) ([=>]) ([^,]+)", entries):
            for variant in variants.strip().split("/"):
                words |= {(place, variant): (text.replace("~", variant), sign == "=") for place in places.split("/")}
    return words


def oklab(color: str) -> np.ndarray:
    """OKLab of "rrggbb" (https://bottosson.github.io/posts/oklab), with less lightness, to compare hues."""
    rgb = (np.array(list(bytes.fromhex(color))) / 255) ** 2.2
    cones = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]) @ rgb
    return np.array([[0.126, 0.476, -0.0024], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]) @ np.cbrt(cones)


@lru_cache
def name_color(color: str) -> str:
    """The nearest name in COLORS for "#rrggbb"; "light" or "dark" for "#rrggbbaa", which is blended with others."""
    if len(color) == 9:
        return "light" if sum(bytes.fromhex(color[1:7])) > 384 else "dark"
    names = [entry.rsplit(" ", 1) for entry in COLORS.strip().replace("\n", ", ").split(", ")]
    return min(names, key=lambda entry: np.linalg.norm(oklab(entry[1]) - oklab(color[1:])))[0]


def name_skin(color: str) -> str:
    luma = np.dot(list(bytes.fromhex(color[1:])), [0.299, 0.587, 0.114])
    return ["dark", "brown", "tan", "light"][np.searchsorted([95, 145, 195], luma)]
