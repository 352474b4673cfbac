"""The rendered world: scene graphs, their pixels, and captions that are true of them.

A *video* is {"id", "scenes": [scene, ...]}.
A *scene* is {"theme", "camera": moves, "objects": [object, ...], "seed"}.
An *object* is {"colour", "shape", "size", "texture", "place", "motion": moves}.
*Moves* are a list of one move, or of two in the order in which they happen. No two objects of a
scene share a colour, a shape or a place.

A *caption* is (text, claim). The claim is the part of a scene graph that the text states, and
`holds(scene, claim)` says whether any other scene satisfies it: relevance is computed, not guessed.

There is no global state. The same `random.Random` gives the same scene, the same scene the same
pixels. So the order in which the functions below draw random numbers is part of the data: a draw
more or less, or two in another order, is another world.

Legend: F = 16 frames of a scene, S = 56 pixels per side.
"""

import dataclasses
import io
import itertools
import zlib

import av
import numpy as np

SIZE = 56  # S, pixels per side
FPS = 8
FRAMES = 16  # F: a scene lasts two seconds

COLOURS = {
    "red": (225, 25, 35),
    "orange": (255, 135, 0),
    "yellow": (250, 230, 40),
    "green": (20, 190, 60),
    "blue": (35, 70, 245),
    "purple": (140, 30, 190),
    "pink": (255, 130, 200),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
TEXTURES = ("plain", "striped")
LOOKS = ("size", "texture", "colour", "shape")  # the order in which a noun phrase names them

# Each place's centre (x, y) in pixels, in reading order.
PLACES = {
    "top left": (15, 15),
    "top right": (41, 15),
    "bottom left": (15, 41),
    "bottom right": (41, 41),
}

# For sizes, motions, camera moves and themes: every phrase that a text may use.
# The first motion and the first camera move are rest.
SIZES = {"small": ("small", "little"), "big": ("big", "large")}
MOTIONS = {
    "still": ("stays still", "does not move", "rests in place"),
    "left": ("moves left", "slides to the left", "goes left"),
    "right": ("moves right", "slides to the right", "goes right"),
    "up": ("moves up", "rises", "goes up"),
    "down": ("moves down", "sinks", "goes down"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "blink": ("blinks", "flashes on and off"),
    "loop": ("loops around", "goes round and round"),
}
CAMERAS = {
    "static": ("is static", "stands still"),
    "pan left": ("pans left", "turns to the left"),
    "pan right": ("pans right", "turns to the right"),
    "tilt up": ("tilts up", "looks upwards"),
    "tilt down": ("tilts down", "looks downwards"),
    "zoom in": ("zooms in", "comes closer"),
    "zoom out": ("zooms out", "backs away"),
}
THEMES = {
    "night": ("at night", "under a dark night sky"),
    "sunset": ("at sunset", "in the glow of a sunset"),
    "forest": ("in a forest", "among the trees of a forest"),
    "snow": ("in the snow", "on a day of winter snow"),
    "desert": ("in a desert", "on the sand of a desert"),
    "ocean": ("in the ocean", "under the water of the ocean"),
    "city": ("in a city", "on the streets of a city"),
    "meadow": ("on a meadow", "on the grass of a meadow"),
}

# Frames in which even a blinking object is visible.
VISIBLE = (0, 1, 4, 5, 8, 9, 12, 13)


# Scenes


def held_out(objects):
    """Say whether a set of objects, by colour and shape, belongs to the test side.

    A third of all sets does; training scenes never show one of those.
    """
    names = sorted(o["colour"] + " " + o["shape"] for o in objects)
    return zlib.crc32(",".join(names).encode()) % 3 == 0


def sample_moves(rng, table, two):
    """Draw one move of a table, or two different ones in order.

    Rest, the first entry of the table, never is one of two.
    """
    if two:
        return rng.sample(list(table)[1:], 2)
    return [rng.choice(list(table))]


def other_moves(rng, table, old, two):
    """Draw moves of which none is among the old ones."""
    while True:
        moves = sample_moves(rng, table, two)
        if set(moves).isdisjoint(old):
            return moves


def sample_scene(rng, test, count=None, events=0.35):
    """Draw a scene.

    test    whether its set of objects must be held out or must not be.
    count   number of objects; by default 1 to 3, mostly 2.
    events  probability that an object has two motions.
    """
    if count is None:
        count = rng.choices((1, 2, 3), (2, 6, 2))[0]

    while True:
        colours = rng.sample(list(COLOURS), count)
        shapes = rng.sample(SHAPES, count)
        places = sorted(rng.sample(range(len(PLACES)), count))
        objects = []
        for colour, shape in zip(colours, shapes, strict=True):
            objects.append({"colour": colour, "shape": shape})
        if held_out(objects) == test:
            break

    # Of three objects only one may have two motions: a caption of 25 words must hold them all.
    eventful = rng.randrange(count)
    for i, o in enumerate(objects):
        o["size"] = rng.choice(list(SIZES))
        o["texture"] = rng.choices(TEXTURES, (2, 1))[0]
        o["place"] = list(PLACES)[places[i]]
        two = rng.random() < events and (count < 3 or i == eventful)
        o["motion"] = sample_moves(rng, MOTIONS, two)

    return {
        "theme": rng.choice(list(THEMES)),
        "camera": sample_moves(rng, CAMERAS, rng.random() < 0.15),
        "objects": objects,
        "seed": rng.getrandbits(32),
    }


def change(scene, kind, rng, test):
    """Make a near-twin of a scene, in which one thing is different.

    kind    motion (an object moves in another way), order (its two motions swap), exchange (two
            objects trade their motions), place (an object moves to another place, and whoever is
            there takes the old one), size, texture, colour, camera or theme.
    test    the side on which a changed colour must leave the set of objects.

    Returns (twin, {"kind", "object", "to"}), or None if this kind cannot apply to this scene.
    """
    objects = [dict(o) for o in scene["objects"]]
    twin = {**scene, "objects": objects, "seed": rng.getrandbits(32)}
    changed = objects[rng.randrange(len(objects))]

    if kind == "motion":
        two = len(changed["motion"]) == 2
        changed["motion"] = other_moves(rng, MOTIONS, changed["motion"], two)
    elif kind == "order":
        changed = reverse_motions(objects)
    elif kind == "exchange":
        changed = exchange_motions(objects)
    elif kind == "place":
        move_away(changed, objects, rng)
    elif kind == "size":
        changed["size"] = {"small": "big", "big": "small"}[changed["size"]]
    elif kind == "texture":
        changed["texture"] = {"plain": "striped", "striped": "plain"}[changed["texture"]]
    elif kind == "colour":
        changed = recolour(changed, objects, rng, test)
    elif kind == "camera":
        two = rng.random() < 0.3
        twin["camera"] = other_moves(rng, CAMERAS, scene["camera"], two)
    elif kind == "theme":
        others = [theme for theme in THEMES if theme != scene["theme"]]
        twin["theme"] = rng.choice(others)

    if changed is None:
        return None
    key = "motion" if kind in ("order", "exchange") else kind
    holder = twin if key in ("camera", "theme") else changed
    return twin, {"kind": key, "object": changed["shape"], "to": holder[key]}


def reverse_motions(objects):
    """Swap the motions of the first object that has two. Returns it, or None if there is none."""
    for o in objects:
        if len(o["motion"]) == 2:
            o["motion"] = o["motion"][::-1]
            return o
    return None


def exchange_motions(objects):
    """Let the first two objects trade their motions.

    Returns the first, or None if that would change nothing.
    """
    if len(objects) < 2:
        return None
    first, second = objects[:2]
    if first["motion"] == second["motion"]:
        return None
    first["motion"], second["motion"] = second["motion"], first["motion"]
    return first


def move_away(moved, objects, rng):
    """Move an object to another place, and the object that stands there, if any, to the old one."""
    place = rng.choice([p for p in PLACES if p != moved["place"]])
    for o in objects:
        if o["place"] == place:
            o["place"] = moved["place"]
    moved["place"] = place


def recolour(changed, objects, rng, test):
    """Give an object a free colour that keeps the set of objects on its side.

    Returns the object, or None if there is no such colour.
    """
    others = [o for o in objects if o is not changed]
    taken = [o["colour"] for o in objects]
    free = []
    for colour in COLOURS:
        recoloured = {**changed, "colour": colour}
        if colour not in taken and held_out([recoloured, *others]) == test:
            free.append(colour)
    if not free:
        return None
    changed["colour"] = rng.choice(free)
    return changed


# Pixels


@dataclasses.dataclass(frozen=True)
class Ground:
    """The background of a theme: a colour with marks of another colour scattered over it."""

    colour: tuple
    mark_colour: tuple
    marks: int  # how many
    radius: float  # of a mark, in pixels


GROUNDS = {
    "night": Ground((16, 18, 48), (150, 150, 110), 50, 1.6),
    "sunset": Ground((150, 75, 60), (205, 125, 80), 22, 5.0),
    "forest": Ground((30, 62, 34), (14, 34, 18), 34, 3.6),
    "snow": Ground((150, 160, 172), (205, 210, 218), 44, 2.2),
    "desert": Ground((172, 140, 92), (130, 100, 58), 26, 4.4),
    "ocean": Ground((22, 78, 112), (60, 128, 156), 32, 3.2),
    "city": Ground((72, 72, 80), (122, 120, 104), 40, 2.6),
    "meadow": Ground((104, 132, 66), (150, 168, 90), 40, 2.6),
}
GROUND_SIZE = 96  # pixels per side of the background, which repeats beyond its edges
LANDMARK_RADIUS = 12

RADII = {"small": 6.0, "big": 9.0}
DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
LOOP_RADIUS = 7
GROWTH = 0.95  # change of the radius' logarithm over a motion

# What one frame adds to the camera's view: pixels to the right, pixels down, logarithm of the zoom.
CAMERA_STEPS = {
    "static": (0, 0, 0),
    "pan left": (-2, 0, 0),
    "pan right": (2, 0, 0),
    "tilt up": (0, -2, 0),
    "tilt down": (0, 2, 0),
    "zoom in": (0, 0, 0.065),
    "zoom out": (0, 0, -0.065),
}


def shape_distance(shape, x, y, r):
    """Return the signed distance in pixels, roughly, to the outline of a shape of radius r.

    x, y (S, S): pixels to the right of and below the shape's centre. Negative inside.
    """
    distance = np.hypot(x, y)
    if shape == "circle":
        return distance - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86 * r
    if shape == "triangle":
        sides = abs(x) * 0.87 - y * 0.5 - 0.55 * r
        base = y - 0.75 * r
        return np.maximum(sides, base)
    if shape == "cross":
        across = np.maximum(abs(x) - r, abs(y) - 0.33 * r)
        upright = np.maximum(abs(x) - 0.33 * r, abs(y) - r)
        return np.minimum(across, upright)
    if shape == "ring":
        return abs(distance - 0.75 * r) - 0.28 * r

    # A star: the outline's radius swings five times around the centre, a point on top.
    angle = np.arctan2(x, -y)
    return distance - 1.15 * r * (0.66 + 0.34 * np.cos(5 * angle))


def centred(path):
    """Shift a path (F, ...) so that the middle of its range is zero."""
    return path - (path.max(0) + path.min(0)) / 2


def track(o, offset):
    """Return where an object is: centre (F, 2) in pixels, radius (F,), visible (F,) bool."""
    steps = np.zeros((FRAMES, 2))
    growth = np.zeros(FRAMES)
    visible = np.ones(FRAMES, bool)

    motions = o["motion"]
    distance = 17 if len(motions) == 1 else 14
    spans = np.array_split(np.arange(FRAMES), len(motions))
    for motion, span in zip(motions, spans, strict=True):
        n = len(span)
        if motion in DIRECTIONS:
            steps[span] = np.array(DIRECTIONS[motion]) * distance / n
        elif motion == "loop":
            angle = 2 * np.pi * np.arange(n) / n
            tangent = np.stack([-np.sin(angle), np.cos(angle)], 1)
            steps[span] = tangent * 2 * np.pi * LOOP_RADIUS / n
        elif motion == "grow":
            growth[span] = GROWTH / n
        elif motion == "shrink":
            growth[span] = -GROWTH / n
        elif motion == "blink":
            visible[span] = span // 2 % 2 == 0

    # The middle of its range is the place, and the size, that captions state.
    path = centred(np.cumsum(steps, 0))
    centre = PLACES[o["place"]] + path + offset
    log_scale = centred(np.cumsum(growth))
    radius = RADII[o["size"]] * np.exp(log_scale)
    return centre, radius, visible


def tracks(scene):
    """Return the track of each object of a scene, which stands up to 1.5 pixels off its place."""
    objects = scene["objects"]
    jitter = np.random.default_rng(scene["seed"] + 1)
    offsets = jitter.uniform(-1.5, 1.5, (len(objects), 2))
    return [track(o, offset) for o, offset in zip(objects, offsets, strict=True)]


def camera_path(scene):
    """Return the camera's view (F, 3), centred on zero: pixels right and down, log of the zoom."""
    moves = scene["camera"]
    steps = []
    for frame in range(FRAMES):
        move = moves[frame * len(moves) // FRAMES]  # of two moves, each has half of the frames
        steps.append(CAMERA_STEPS[move])
    return centred(np.cumsum(steps, 0))


def background(scene):
    """Draw a theme's ground (96, 96, 3), float, values 0 to 255, seamless at its edges.

    Marks are scattered by the scene's seed. A large round landmark in the middle (a moon, a hill, a
    pond) shows how the camera moves.
    """
    ground = GROUNDS[scene["theme"]]
    rng = np.random.default_rng(scene["seed"])
    y, x = np.mgrid[:GROUND_SIZE, :GROUND_SIZE]

    marks = np.zeros((GROUND_SIZE, GROUND_SIZE))
    for mark_x, mark_y in rng.uniform(0, GROUND_SIZE, (ground.marks, 2)):
        dx = abs(x - mark_x)
        dy = abs(y - mark_y)
        # The shorter way around: a mark at one edge goes on at the other.
        dx = np.minimum(dx, GROUND_SIZE - dx)
        dy = np.minimum(dy, GROUND_SIZE - dy)
        distance = np.hypot(dx, dy)
        marks = np.maximum(marks, np.clip(ground.radius + 0.5 - distance, 0, 1))

    landmark_x, landmark_y = GROUND_SIZE // 2 + rng.uniform(-3, 3, 2)
    distance = np.hypot(x - landmark_x, y - landmark_y)
    landmark = np.clip((LANDMARK_RADIUS - distance) / 2, 0, 1)

    cover = np.maximum(marks * 0.5, landmark)[..., None]  # (96, 96, 1)
    colour = np.array(ground.colour)
    mark_colour = np.array(ground.mark_colour)
    return colour * (1 - cover) + mark_colour * cover


def look_up(texture, u, v):
    """Read a background at positions u, v (S, S) between its pixels, bilinearly -> (S, S, 3)."""
    left = np.floor(u).astype(int)
    top = np.floor(v).astype(int)
    right_share = (u - left)[..., None]
    bottom_share = (v - top)[..., None]

    def corner(down, right):
        return texture[(top + down) % GROUND_SIZE, (left + right) % GROUND_SIZE]

    upper = corner(0, 0) * (1 - right_share) + corner(0, 1) * right_share
    lower = corner(1, 0) * (1 - right_share) + corner(1, 1) * right_share
    return upper * (1 - bottom_share) + lower * bottom_share


def paint(image, o, x, y, radius):
    """Return an image (S, S, 3) with an object painted over it; x, y (S, S) from its centre."""
    distance = shape_distance(o["shape"], x, y, radius)

    # A dark rim, so that no colour melts into its theme.
    rim = np.clip(1.7 - distance, 0, 1)[..., None]
    image = image * (1 - 0.75 * rim)

    colour = np.array(COLOURS[o["colour"]], float)
    if o["texture"] == "striped":
        stripes = np.sin((x + y) * 1.3) > 0
        colour = colour * (1 - 0.5 * stripes[..., None])
    alpha = np.clip(0.5 - distance, 0, 1)[..., None]
    return image * (1 - alpha) + colour * alpha


def render_scene(scene):
    """Draw a scene: uint8 (F, S, S, 3).

    The camera moves over the background; objects keep their place on the screen.
    """
    ys, xs = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    texture = background(scene)
    paths = tracks(scene)

    frames = []
    for frame, (right, down, zoom) in enumerate(camera_path(scene)):
        u = (xs - SIZE // 2) * np.exp(-zoom) + GROUND_SIZE // 2 + right
        v = (ys - SIZE // 2) * np.exp(-zoom) + GROUND_SIZE // 2 + down
        image = look_up(texture, u, v)
        for o, (centre, radius, visible) in zip(scene["objects"], paths, strict=True):
            if visible[frame]:
                x = xs - centre[frame, 0]
                y = ys - centre[frame, 1]
                image = paint(image, o, x, y, radius[frame])
        frames.append(image)
    return np.clip(np.stack(frames) + 0.5, 0, 255).astype(np.uint8)


def encode_mp4(frames):
    """Encode uint8 (n, H, W, 3) as the bytes of an H.264 mp4 file.

    One thread and no B-frames, so that the same frames give the same bytes.
    """
    buffer = io.BytesIO()
    options = {"crf": "14", "preset": "veryfast", "bf": "0", "threads": "1"}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_mp4(data):
    """Decode all frames of an mp4 file's bytes: uint8 (n, H, W, 3)."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


# Truth


def relations(a, b):
    """List the relations in which place a stands to place b."""
    ax, ay = PLACES[a]
    bx, by = PLACES[b]
    true = []
    if ax < bx:
        true.append("left of")
    if ax > bx:
        true.append("right of")
    if ay < by:
        true.append("above")
    if ay > by:
        true.append("below")
    return true


def moves_hold(claimed, actual):
    """Say whether claimed moves are true of actual ones.

    One claimed move must occur ("rises", of an object that rises and then blinks); two must be all
    moves, in order.
    """
    if len(claimed) == 1:
        return claimed[0] in actual
    return claimed == actual


def object_fits(wanted, o):
    """Say whether an object has all the properties that a claim names."""
    for key, value in wanted.items():
        if key == "motion":
            if not moves_hold(value, o["motion"]):
                return False
        elif o[key] != value:
            return False
    return True


def holds(scene, claim):
    """Say whether a scene satisfies a claim: theme, count and camera, and a choice of its objects.

    A claim's relations are [i, relation, j] between its own i-th and j-th object.
    """
    if claim.get("theme", scene["theme"]) != scene["theme"]:
        return False
    count = len(scene["objects"])
    if claim.get("count", count) != count:
        return False
    if "camera" in claim and not moves_hold(claim["camera"], scene["camera"]):
        return False

    wanted = claim.get("objects", [])
    for chosen in itertools.permutations(scene["objects"], len(wanted)):
        if all(map(object_fits, wanted, chosen)) and relations_hold(claim, chosen):
            return True
    return False


def relations_hold(claim, chosen):
    """Say whether the objects chosen for a claim's objects stand in the claimed relations."""
    for i, relation, j in claim.get("relations", []):
        if relation not in relations(chosen[i]["place"], chosen[j]["place"]):
            return False
    return True


def satisfies(video, claim):
    """Say whether a video satisfies a claim.

    {"scenes": [claims]} must hold scene by scene, any other claim in any one of the scenes.
    """
    scenes = video["scenes"]
    if "scenes" in claim:
        claims = claim["scenes"]
        return len(claims) == len(scenes) and all(map(holds, scenes, claims))
    return any(holds(scene, claim) for scene in scenes)


# Phrases


def noun_phrase(o, rng=None, keys=("colour", "shape"), article="a"):
    """Name an object by some of its LOOKS, as in "a little striped red star".

    Only a size has synonyms, so only a size draws from rng.
    """
    words = []
    for key in LOOKS:
        if key not in keys:
            continue
        word = o[key]
        if key == "size":
            word = rng.choice(SIZES[word])
        words.append(word)
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words])


def moves_phrase(moves, table, rng):
    """Say one move ("rises") or two in order ("first rises, then blinks")."""
    words = [rng.choice(table[move]) for move in moves]
    if len(words) == 1:
        return words[0]
    form = rng.choice(("first {}, then {}", "{} and then {}", "{} before it {}"))
    return form.format(*words)


def motion_phrase(o, rng):
    """Say how an object moves."""
    return moves_phrase(o["motion"], MOTIONS, rng)


def camera_phrase(moves, rng):
    """Say how the camera moves, as a clause: "the view zooms in"."""
    return rng.choice(("the camera ", "the view ")) + moves_phrase(moves, CAMERAS, rng)


def theme_phrase(theme, rng):
    """Say where a scene plays: "in the snow"."""
    return rng.choice(THEMES[theme])


def sentence(*parts):
    """Join the parts that are not empty, with a capital letter and a full stop."""
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + "."


def enumerate_words(parts):
    """Join phrases: "a", "a and b", "a, b and c"."""
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def relation_sentence(o, relation, other):
    """State a relation of an object to another one, which is given as a phrase."""
    return sentence("the", o["shape"], "is", relation, other)


def pick(mapping, *keys):
    """Return the part of a dict with these keys, in this order."""
    return {key: mapping[key] for key in keys}


def facts_of(objects, *keys):
    """Return the objects of a claim: of each, the properties that a caption states."""
    return [pick(o, *keys) for o in objects]


def name_shapes(objects):
    """Name objects by their shapes: "a star and a ring"."""
    names = [noun_phrase(o, keys=("shape",)) for o in objects]
    return enumerate_words(names)


def objects_of(scene, rng, shuffle):
    """Return a scene's objects in random order, or in reading order without a draw."""
    if shuffle:
        return rng.sample(scene["objects"], len(scene["objects"]))
    return scene["objects"]


# Captions. Each function returns (text, claim) and says in its docstring what its text contains.
# shuffle: name the objects in random order, not in reading order.


def concise(scene, rng, shuffle=False):
    """10 to 25 words: colour, shape and motion of all objects; theme or camera where they fit."""
    objects = objects_of(scene, rng, shuffle)
    events = [noun_phrase(o) + " " + motion_phrase(o, rng) for o in objects]
    body = enumerate_words(events)
    claim = {"objects": facts_of(objects, "colour", "shape", "motion")}

    # Both are drawn even if there is no room for them.
    theme = theme_phrase(scene["theme"], rng)
    camera = camera_phrase(scene["camera"], rng)

    # Where the theme fits into 25 words, short texts always get it and others every second time.
    tail = ""
    theme_fits = len((body + theme).split()) <= 24
    if theme_fits and (len(body.split()) < 10 or rng.random() < 0.5):
        tail = theme
        claim["theme"] = scene["theme"]
    if len((body + tail).split()) < 10:
        tail += " while " + camera
        claim["camera"] = scene["camera"]
    return sentence(body, tail), claim


def spatial(scene, rng, shuffle=False):
    """Looks, places and relations of all objects, and the theme; no motion."""
    objects = objects_of(scene, rng, shuffle)
    looks = facts_of(objects, "colour", "shape", "size", "texture", "place")
    claim = {"theme": scene["theme"], "objects": looks, "relations": []}

    parts = []
    for o in objects:
        opening = rng.choice(("there is", "one sees"))
        name = noun_phrase(o, rng, LOOKS)
        parts.append(sentence(opening, name, "in the", o["place"]))
    # Each object to the next one that is named.
    for i in range(len(objects) - 1):
        o = objects[i]
        following = objects[i + 1]
        relation = rng.choice(relations(o["place"], following["place"]))
        claim["relations"].append([i, relation, i + 1])
        parts.append(relation_sentence(o, relation, noun_phrase(following, article="the")))
    parts.append(sentence("all this is", theme_phrase(scene["theme"], rng)))
    return " ".join(parts), claim


def temporal(scene, rng, shuffle=True):
    """Motions of all objects in order, and the camera; no places."""
    objects = objects_of(scene, rng, shuffle)
    parts = []
    for o in objects:
        article = rng.choice(("a", "the"))
        name = noun_phrase(o, article=article)
        parts.append(sentence(name, motion_phrase(o, rng)))
    opening = rng.choice(("meanwhile,", "during this,"))
    parts.append(sentence(opening, camera_phrase(scene["camera"], rng)))

    facts = facts_of(objects, "colour", "shape", "motion")
    return " ".join(parts), {"objects": facts, "camera": scene["camera"]}


def rich(scene, rng, shuffle=False):
    """Up to 60 words: looks, places and motions of all objects, theme and camera."""
    objects = objects_of(scene, rng, shuffle)
    # Three objects leave no room for textures.
    keys = LOOKS if len(objects) < 3 else ("size", "colour", "shape")
    parts = []
    for o in objects:
        name = noun_phrase(o, rng, keys)
        parts.append(sentence(name, "in the", o["place"], motion_phrase(o, rng)))
    claim = {
        "objects": facts_of(objects, *keys, "place", "motion"),
        "theme": scene["theme"],
        "camera": scene["camera"],
    }

    # One relation, if there is room for it within 60 words.
    if len(objects) == 2:
        first, second = objects
        relation = rng.choice(relations(first["place"], second["place"]))
        claim["relations"] = [[0, relation, 1]]
        parts.append(relation_sentence(first, relation, "the " + second["shape"]))

    theme = theme_phrase(scene["theme"], rng)
    parts.append(sentence("it happens", theme, "and", camera_phrase(scene["camera"], rng)))
    return " ".join(parts), claim


def abstract(scene, rng, shuffle=False):
    """The gist: theme, number of objects, shapes and camera; no colours."""
    count = ("one thing", "two things", "three things")[len(scene["objects"]) - 1]
    place = theme_phrase(scene["theme"], rng)
    shapes = name_shapes(objects_of(scene, rng, shuffle))
    opening = rng.choice(("a quiet story", "a short study", "a little play"))
    preposition = rng.choice((" about ", " of "))

    start = sentence(opening + preposition + count, place)
    end = sentence("its theme is", shapes, "while", camera_phrase(scene["camera"], rng))
    # theme() also draws a text that nobody reads; the rendered worlds depend on those draws.
    _, claim = theme(scene, rng)
    return start + " " + end, {**claim, "camera": scene["camera"]}


def theme(scene, rng):
    """The theme alone: place and light, and the shapes that the scene is about."""
    shapes = name_shapes(objects_of(scene, rng, shuffle=True))
    forms = (
        "the theme is {shapes} {place}",
        "a scene {place} with the theme {shapes}",
        "the clip plays {place} and is about {shapes}",
    )
    form = rng.choice(forms)
    place = theme_phrase(scene["theme"], rng)
    text = sentence(form.format(shapes=shapes, place=place))
    return text, {
        "theme": scene["theme"],
        "count": len(scene["objects"]),
        "objects": facts_of(scene["objects"], "shape"),
    }


def keywords(scene, rng, shuffle=False, still=False):
    """3 to 30 words, separated by commas: theme, objects and, unless still, motions and camera."""
    objects = objects_of(scene, rng, shuffle)
    facts = facts_of(objects, "colour", "shape")
    claim = {"theme": scene["theme"], "objects": facts}
    words = [scene["theme"]]
    words += [o["colour"] + " " + o["shape"] for o in objects]
    if still:
        return ", ".join(words), claim

    # Of two moves the first alone: a claim of one move holds wherever it occurs.
    for o, fact in zip(objects, facts, strict=True):
        fact["motion"] = o["motion"][:1]
        words.append(o["shape"] + " " + motion_phrase(fact, rng))
    claim["camera"] = scene["camera"][:1]
    words.append("static camera" if scene["camera"] == ["static"] else scene["camera"][0])
    return ", ".join(words), claim


def partial(scene, rng, shuffle=False):
    """One event of several: a single motion of a single object."""
    o = rng.choice(scene["objects"])
    keys = rng.choice((("colour", "shape"), ("size", "colour", "shape")))
    event = pick(o, *keys)
    event["motion"] = [rng.choice(o["motion"])]
    opening = rng.choice(("", "at one moment", "somewhere"))
    text = sentence(opening, noun_phrase(o, rng, keys), motion_phrase(event, rng))
    return text, {"objects": [event]}


def main_object(scene, rng):
    """Looks, place and motion of the first object in reading order."""
    o = scene["objects"][0]
    look = sentence("the main object is", noun_phrase(o, rng, LOOKS))
    event = sentence("it is in the", o["place"], "and", motion_phrase(o, rng))
    return look + " " + event, {"objects": [o]}


def camera(scene, rng):
    """The camera's moves, and the place and the object that it films."""
    o = rng.choice(scene["objects"])
    moves = sentence(camera_phrase(scene["camera"], rng))
    subject = sentence("it films", noun_phrase(o), theme_phrase(scene["theme"], rng))
    return moves + " " + subject, {
        "camera": scene["camera"],
        "theme": scene["theme"],
        "objects": facts_of([o], "colour", "shape"),
    }


def paragraph(scene, rng):
    """Sentences about single events, joined, and the theme (DiDeMo's form)."""
    text, claim = temporal(scene, rng)
    place = sentence("it happens", theme_phrase(scene["theme"], rng))
    return text + " " + place, {**claim, "theme": scene["theme"]}


def detail(scene, rng):
    """60 to 250 words: everything, object by object, relation by relation, event by event."""
    look, claim = spatial(scene, rng, shuffle=True)
    events, _ = temporal(scene, rng)
    count = ("one object", "two objects", "three objects")[len(scene["objects"]) - 1]
    parts = [sentence("this is a video of", count), look, events]

    for o in objects_of(scene, rng, shuffle=True):
        opening = f"looking at {noun_phrase(o, article='the')} again, it is"
        size = rng.choice(SIZES[o["size"]])
        place = f"{o['texture']}, stays near the {o['place']} part and"
        parts.append(sentence(opening, size, "and", place, motion_phrase(o, rng)))
    theme = theme_phrase(scene["theme"], rng)
    parts.append(sentence("the place and the light say that it plays", theme))

    # In the order of spatial(), to which the relations refer.
    by_colour = {o["colour"]: o for o in scene["objects"]}
    claim["objects"] = [by_colour[o["colour"]] for o in claim["objects"]]
    claim["camera"] = scene["camera"]
    claim["count"] = len(scene["objects"])
    return " ".join(parts), claim


def story(video, rng):
    """A long video in up to 250 words: theme, objects, motions and camera of each scene in turn."""
    openings = ("first", "next", "after that", "at the end")
    keys = ("size", "colour", "shape")
    parts = []
    claims = []
    for opening, scene in zip(openings, video["scenes"], strict=False):
        objects = objects_of(scene, rng, shuffle=True)
        place = theme_phrase(scene["theme"], rng)
        parts.append(sentence(opening + ", the scene is", place))
        for o in objects:
            name = noun_phrase(o, rng, keys)
            parts.append(sentence(name, "in the", o["place"], motion_phrase(o, rng)))
        parts.append(sentence(camera_phrase(scene["camera"], rng)))

        facts = facts_of(objects, *keys, "place", "motion")
        claims.append({**pick(scene, "theme", "camera"), "objects": facts})
    return " ".join(parts), {"scenes": claims}


def snapshot(scene, rng, shuffle=False):
    """One frame: the theme, and every object with its place."""
    objects = objects_of(scene, rng, shuffle)
    theme = theme_phrase(scene["theme"], rng)
    names = enumerate_words([noun_phrase(o) + " in the " + o["place"] for o in objects])
    text = sentence("a picture", theme, "with", names)
    facts = facts_of(objects, "colour", "shape", "place")
    return text, {"theme": scene["theme"], "objects": facts}


def minimal(scene, rng, shuffle=False):
    """One frame: a single object and its place."""
    o = rng.choice(scene["objects"])
    text = sentence(noun_phrase(o), "in the", o["place"])
    return text, {"objects": facts_of([o], "colour", "shape", "place")}


def still_theme(scene, rng, shuffle=False):
    """A frame's theme alone, always in random order."""
    return theme(scene, rng)


def still_keywords(scene, rng, shuffle=False):
    """A frame's keywords: no motion, no camera."""
    return keywords(scene, rng, shuffle, still=True)


# V-SynFlow's five styles, of a video and of a single frame, which proves neither motion nor camera.
VIDEO_STYLES = {
    "concise": concise,
    "rich": rich,
    "abstract": abstract,
    "keywords": keywords,
    "partial": partial,
}
FRAME_STYLES = {
    "concise": snapshot,
    "rich": spatial,
    "abstract": still_theme,
    "keywords": still_keywords,
    "minimal": minimal,
}


def composed(twin, difference, rng):
    """Ask for a twin, given its reference: the second half of a composed query.

    twin, difference: as `change` returns them. The claim is the twin's objects, and the difference.
    """
    kind = difference["kind"]
    to = difference["to"]
    the_object = "the " + difference["object"]
    if kind == "motion":
        news = the_object + " " + moves_phrase(to, MOTIONS, rng)
    elif kind == "place":
        news = the_object + " is in the " + to
    elif kind == "size":
        news = the_object + " is " + rng.choice(SIZES[to])
    elif kind == "camera":
        news = camera_phrase(to, rng)
    elif kind == "theme":
        news = "it is " + theme_phrase(to, rng)
    else:  # colour, texture
        news = the_object + " is " + to

    claim = {"objects": facts_of(twin["objects"], "colour", "shape")}
    if kind in ("camera", "theme"):
        claim[kind] = to
    else:
        for o in claim["objects"]:
            if o["shape"] == difference["object"]:
                o[kind] = to

    forms = (
        "the same scene, but {} instead",
        "like this one, but now {}",
        "the same objects, only {} this time",
    )
    return sentence(rng.choice(forms).format(news)), claim


# Motion phrases as lists of words, longest first: "goes round and round" before shorter ones.
PHRASES = [(phrase, motion) for motion, phrases in MOTIONS.items() for phrase in phrases]
PHRASES.sort(key=lambda pair: -len(pair[0]))


def read_events(text):
    """Read a concise caption back: {(colour, shape): [motions in the order told]}.

    Used to measure what the mini base writes.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    events = {}
    current = None  # motions of the object named last
    at = 0
    while at < len(words):
        name = tuple(words[at : at + 2])
        if len(name) == 2 and name[0] in COLOURS and name[1] in SHAPES:
            current = events.setdefault(name, [])
            at += 2
            continue

        if words[at] in ("camera", "view"):
            current = None  # "the camera stands still" is no event of an object
        elif current is not None:
            phrase, motion = phrase_at(words[at:])
            if motion:
                current.append(motion)
                at += len(phrase.split())
                continue
        at += 1
    return events


def phrase_at(words):
    """Return the motion phrase with which a list of words begins, and its motion; or ("", None)."""
    text = " ".join(words) + " "
    for phrase, motion in PHRASES:
        if text.startswith(phrase + " "):
            return phrase, motion
    return "", None
