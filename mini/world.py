"""The rendered world: scene graphs, their pixels, and the texts that are true of them (DESIGN.md section 4).

A *video* is {"id", "scenes": [scene, ...]}, a *scene* {"theme", "camera": [move] or [first, then], "objects": [...], "seed"},
an *object* {"colour", "shape", "size", "texture", "place", "motion": [motion] or [first, then]}; no two objects of a scene share
colour, shape or place. There is no global state: the same `random.Random` gives the same scene, the same scene the same pixels.

A *caption* is (text, claim). The claim is the part of a scene graph that the text states; `holds(scene, claim)` says whether any
other scene satisfies it, so relevance is computed and never guessed. Legend: F = 16 frames, S = 56 pixels.
"""

import io
import itertools
import zlib

import av
import numpy as np

SIZE, FPS, FRAMES = 56, 8, 16  # pixels per side, frames per second, frames of one scene
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
PLACES = {
    "top left": (15, 15),
    "top right": (41, 15),
    "bottom left": (15, 41),
    "bottom right": (41, 41),
}  # in reading order
SIZES = {"small": ("small", "little"), "big": ("big", "large")}
MOTIONS = {  # and every way a text may say it
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
THEMES = {  # colours of the ground and of its marks, number of marks, their radius in pixels, words
    "night": ((16, 18, 48), (150, 150, 110), 50, 1.6, ("at night", "under a dark night sky")),
    "sunset": ((150, 75, 60), (205, 125, 80), 22, 5.0, ("at sunset", "in the glow of a sunset")),
    "forest": ((30, 62, 34), (14, 34, 18), 34, 3.6, ("in a forest", "among the trees of a forest")),
    "snow": ((150, 160, 172), (205, 210, 218), 44, 2.2, ("in the snow", "on a day of winter snow")),
    "desert": ((172, 140, 92), (130, 100, 58), 26, 4.4, ("in a desert", "on the sand of a desert")),
    "ocean": (
        (22, 78, 112),
        (60, 128, 156),
        32,
        3.2,
        ("in the ocean", "under the water of the ocean"),
    ),
    "city": ((72, 72, 80), (122, 120, 104), 40, 2.6, ("in a city", "on the streets of a city")),
    "meadow": (
        (104, 132, 66),
        (150, 168, 90),
        40,
        2.6,
        ("on a meadow", "on the grass of a meadow"),
    ),
}
VISIBLE = (0, 1, 4, 5, 8, 9, 12, 13)  # frames in which even a blinking object is shown


# Scenes


def held_out(objects):
    """Say whether a set of objects (by colour and shape) is on the test side: a third of all sets, never in training."""
    return (
        zlib.crc32(",".join(sorted(o["colour"] + " " + o["shape"] for o in objects)).encode()) % 3
        == 0
    )


def sample_moves(rng, table, two):
    """Draw one move, or two different ones in order; the first of the table, rest, only stands alone."""
    return rng.sample(list(table)[1:], 2) if two else [rng.choice(list(table))]


def other_moves(rng, table, old, two):
    """Draw moves of which none is among the old ones."""
    while set(moves := sample_moves(rng, table, two)) & set(old):
        pass
    return moves


def sample_scene(rng, test, count=None, events=0.35):
    """Draw a scene of `count` objects (default 1-3, mostly 2) on the test or training side; `events`: chance of two motions."""
    n = count or rng.choices((1, 2, 3), (2, 6, 2))[0]
    while True:
        colours, shapes, places = (
            rng.sample(list(COLOURS), n),
            rng.sample(SHAPES, n),
            sorted(rng.sample(range(4), n)),
        )
        objects = [{"colour": c, "shape": s} for c, s in zip(colours, shapes, strict=True)]
        if held_out(objects) == test:
            break
    once = rng.randrange(
        n
    )  # of three objects only one has two motions: a caption of 25 words must hold them
    for i, o in enumerate(objects):
        o.update(
            size=rng.choice(list(SIZES)),
            texture=rng.choices(("plain", "striped"), (2, 1))[0],
            place=list(PLACES)[places[i]],
            motion=sample_moves(rng, MOTIONS, rng.random() < events and (n < 3 or i == once)),
        )
    return {
        "theme": rng.choice(list(THEMES)),
        "camera": sample_moves(rng, CAMERAS, rng.random() < 0.15),
        "objects": objects,
        "seed": rng.getrandbits(32),
    }


def change(scene, kind, rng, test):
    """Make a near-twin, the scene with one thing altered: (twin, {"kind", "object", "to"}); None if the kind cannot apply.

    kinds: motion (an object moves otherwise), order (its two motions swap), exchange (two objects trade motions), place (a move
    to a free place, or two objects swap), size, texture, colour, camera, theme.
    """
    twin = {**scene, "objects": [dict(o) for o in scene["objects"]], "seed": rng.getrandbits(32)}
    objects, o = twin["objects"], twin["objects"][rng.randrange(len(scene["objects"]))]
    if kind == "motion":
        o["motion"] = other_moves(rng, MOTIONS, o["motion"], len(o["motion"]) == 2)
    elif kind == "order":
        o = next((p for p in objects if len(p["motion"]) == 2), None)
        if o is None:
            return None
        o["motion"] = o["motion"][::-1]
    elif kind == "exchange":
        if len(objects) < 2 or objects[0]["motion"] == objects[1]["motion"]:
            return None
        o = objects[0]
        o["motion"], objects[1]["motion"] = objects[1]["motion"], o["motion"]
    elif kind == "place":
        new = rng.choice([p for p in PLACES if p != o["place"]])
        for p in objects:
            p["place"] = o["place"] if p["place"] == new else p["place"]
        o["place"] = new
    elif kind in ("size", "texture"):
        o[kind] = {"small": "big", "big": "small", "plain": "striped", "striped": "plain"}[o[kind]]
    elif kind == "colour":
        others = [p for p in objects if p is not o]
        taken = [p["colour"] for p in objects]
        free = [
            c for c in COLOURS if c not in taken and held_out([{**o, "colour": c}, *others]) == test
        ]
        if not free:
            return None
        o["colour"] = rng.choice(free)
    elif kind == "camera":
        twin["camera"] = other_moves(rng, CAMERAS, scene["camera"], rng.random() < 0.3)
    elif kind == "theme":
        twin["theme"] = rng.choice([t for t in THEMES if t != scene["theme"]])
    key = "motion" if kind in ("order", "exchange") else kind
    return twin, {
        "kind": key,
        "object": o["shape"],
        "to": twin[key] if key in ("camera", "theme") else o[key],
    }


# Pixels


def shape_distance(shape, x, y, r):
    """Signed distance (roughly, in pixels) to the outline of a shape of radius r around the origin; x, y (S, S)."""
    d = np.hypot(x, y)
    if shape == "circle":
        return d - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86 * r
    if shape == "triangle":
        return np.maximum(abs(x) * 0.87 - y * 0.5 - 0.55 * r, y - 0.75 * r)
    if shape == "cross":
        return np.minimum(
            np.maximum(abs(x) - r, abs(y) - 0.33 * r), np.maximum(abs(x) - 0.33 * r, abs(y) - r)
        )
    if shape == "ring":
        return abs(d - 0.75 * r) - 0.28 * r
    return d - 1.15 * r * (0.66 + 0.34 * np.cos(5 * np.arctan2(x, -y)))  # star


def centred(path):
    return path - (path.max(0) + path.min(0)) / 2


def tracks(scene):
    """Where every object is: a list of (centre (F, 2) in pixels, radius (F,), seen (F,) bool)."""
    jitter, out = (
        np.random.default_rng(scene["seed"] + 1).uniform(-1.5, 1.5, (len(scene["objects"]), 2)),
        [],
    )
    for o, offset in zip(scene["objects"], jitter, strict=True):
        steps, grow, seen = np.zeros((FRAMES, 2)), np.zeros(FRAMES), np.ones(FRAMES, bool)
        for m, span in zip(
            o["motion"], np.array_split(np.arange(FRAMES), len(o["motion"])), strict=True
        ):
            n, angle = len(span), 2 * np.pi * np.arange(len(span)) / len(span)
            if m in ("left", "right", "up", "down"):
                way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[m]
                steps[span] = np.array(way) * (17 if len(o["motion"]) == 1 else 14) / n
            elif m == "loop":
                steps[span] = np.stack([-np.sin(angle), np.cos(angle)], 1) * 2 * np.pi * 7 / n
            elif m in ("grow", "shrink"):
                grow[span] = (1 if m == "grow" else -1) * 0.95 / n
            elif m == "blink":
                seen[span] = span // 2 % 2 == 0
        radius = {"small": 6.0, "big": 9.0}[o["size"]] * np.exp(centred(np.cumsum(grow)))
        out.append((PLACES[o["place"]] + centred(np.cumsum(steps, 0)) + offset, radius, seen))
    return out


def camera_path(scene):
    """Where the camera looks (F, 3): right and down in pixels, and the logarithm of its zoom; zero halfway."""
    step = {
        "pan left": (-2, 0, 0),
        "pan right": (2, 0, 0),
        "tilt up": (0, -2, 0),
        "tilt down": (0, 2, 0),
        "zoom in": (0, 0, 0.065),
        "zoom out": (0, 0, -0.065),
        "static": (0, 0, 0),
    }
    return centred(
        np.cumsum(
            [step[scene["camera"][f * len(scene["camera"]) // FRAMES]] for f in range(FRAMES)], 0
        )
    )


def background(scene):
    """A seamless texture (96, 96, 3): the theme's ground, its marks scattered by the scene's seed, and in the middle a large
    round landmark (a moon, a hill, a pond) by which one sees the camera move."""
    ground, mark, n, radius, _ = THEMES[scene["theme"]]
    rng, (y, x), cover = (
        np.random.default_rng(scene["seed"]),
        np.mgrid[:96, :96],
        np.zeros((96, 96)),
    )
    for cx, cy in rng.uniform(0, 96, (n, 2)):
        dx, dy = abs(x - cx), abs(y - cy)
        cover = np.maximum(
            cover,
            np.clip(
                radius + 0.5 - np.hypot(np.minimum(dx, 96 - dx), np.minimum(dy, 96 - dy)), 0, 1
            ),
        )
    x0, y0 = 48 + rng.uniform(-3, 3, 2)
    cover = np.maximum(cover * 0.5, np.clip((12 - np.hypot(x - x0, y - y0)) / 2, 0, 1))[..., None]
    return np.array(ground) * (1 - cover) + np.array(mark) * cover


def render_scene(scene):
    """Draw a scene: uint8 (F, S, S, 3). The camera moves over the background; objects keep their place on the screen."""
    (ys, xs), texture, paths, frames = (
        np.mgrid[:SIZE, :SIZE].astype(np.float64),
        background(scene),
        tracks(scene),
        [],
    )
    for f, (right, down, zoom) in enumerate(camera_path(scene)):
        u, v = (xs - 28) * np.exp(-zoom) + 48 + right, (ys - 28) * np.exp(-zoom) + 48 + down
        iu, iv = np.floor(u).astype(int), np.floor(v).astype(int)
        fu, fv = (u - iu)[..., None], (v - iv)[..., None]
        at = lambda du, dv: texture[(iv + dv) % 96, (iu + du) % 96]  # noqa: E731, B023  used at once
        image = (at(0, 0) * (1 - fu) + at(1, 0) * fu) * (1 - fv) + (
            at(0, 1) * (1 - fu) + at(1, 1) * fu
        ) * fv
        for o, (centre, radius, seen) in zip(scene["objects"], paths, strict=True):
            if not seen[f]:
                continue
            x, y = xs - centre[f, 0], ys - centre[f, 1]
            d = shape_distance(o["shape"], x, y, radius[f])
            image *= (
                1 - 0.75 * np.clip(1.7 - d, 0, 1)[..., None]
            )  # a dark rim, so that no colour melts into its theme
            shade = (
                1 - 0.5 * (np.sin((x + y) * 1.3) > 0)[..., None] if o["texture"] == "striped" else 1
            )
            alpha = np.clip(0.5 - d, 0, 1)[..., None]
            image = image * (1 - alpha) + np.array(COLOURS[o["colour"]], float) * shade * alpha
        frames.append(image)
    return np.clip(np.stack(frames) + 0.5, 0, 255).astype(np.uint8)


def encode_mp4(frames):
    """H.264 mp4 bytes of uint8 (F, S, S, 3); one thread and no B-frames, so that the same frames give the same bytes."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as box:
        stream = box.add_stream(
            "libx264",
            rate=FPS,
            options={"crf": "14", "preset": "veryfast", "bf": "0", "threads": "1"},
        )
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            box.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        box.mux(stream.encode())
    return out.getvalue()


def decode_mp4(data):
    """All frames uint8 (F, S, S, 3) of mp4 bytes."""
    with av.open(io.BytesIO(data)) as box:
        return np.stack([f.to_ndarray(format="rgb24") for f in box.decode(video=0)])


# Truth


def relations(a, b):
    """The relations in which place a stands to place b."""
    (ax, ay), (bx, by) = PLACES[a], PLACES[b]
    return [
        r
        for r, true in (
            ("left of", ax < bx),
            ("right of", ax > bx),
            ("above", ay < by),
            ("below", ay > by),
        )
        if true
    ]


def said(claimed, actual):
    """One claimed move is true if it occurs ("rises" of what rises and then blinks); two claimed moves must be all, in order."""
    return claimed[0] in actual if len(claimed) == 1 else claimed == actual


def holds(scene, claim):
    """Say whether a scene satisfies a claim: theme, camera and count fit, and so does some choice of its objects."""
    if any(
        claim.get(k, v) != v
        for k, v in (("theme", scene["theme"]), ("count", len(scene["objects"])))
    ):
        return False
    if "camera" in claim and not said(claim["camera"], scene["camera"]):
        return False
    wanted = claim.get("objects", [])
    fits = lambda want, o: all(
        said(v, o[k]) if k == "motion" else o[k] == v for k, v in want.items()
    )  # noqa: E731
    return any(
        all(map(fits, wanted, chosen))
        and all(
            r in relations(chosen[i]["place"], chosen[j]["place"])
            for i, r, j in claim.get("relations", [])
        )
        for chosen in itertools.permutations(scene["objects"], len(wanted))
    )


def satisfies(video, claim):
    """Say whether a video satisfies a claim: {"scenes": [claims]} scene by scene, any other claim in any one of its scenes."""
    if "scenes" in claim:
        return len(claim["scenes"]) == len(video["scenes"]) and all(
            map(holds, video["scenes"], claim["scenes"])
        )
    return any(holds(s, claim) for s in video["scenes"])


# Words: every function returns (text, claim); `shuffle` names the objects in random instead of reading order


def noun(o, rng=None, keys=("colour", "shape"), article="a"):
    """Name an object by the keys given: "a little striped red star"."""
    keys = [k for k in ("size", "texture", "colour", "shape") if k in keys]
    words = " ".join(rng.choice(SIZES[o[k]]) if k == "size" else o[k] for k in keys)
    return ("an " if article == "a" and words[0] in "aeiou" else article + " ") + words


def say(moves, table, rng):
    """Say one move, or two in order: "rises", "first rises, then blinks"."""
    words = [rng.choice(table[m]) for m in moves]
    return (
        words[0]
        if len(words) == 1
        else rng.choice(("first {}, then {}", "{} and then {}", "{} before it {}")).format(*words)
    )


def verb(o, rng):
    return say(o["motion"], MOTIONS, rng)


def lens(camera, rng):
    return rng.choice(("the camera ", "the view ")) + say(camera, CAMERAS, rng)


def mood(theme, rng):
    return rng.choice(THEMES[theme][4])


def sentence(*parts):
    text = " ".join(p for p in parts if p)
    return text[0].upper() + text[1:] + "."


def listed(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def only(o, *keys):
    return {k: o[k] for k in keys}


def ordered(scene, rng, shuffle):
    return rng.sample(scene["objects"], len(scene["objects"])) if shuffle else scene["objects"]


def concise(scene, rng, shuffle=False):
    """10-25 words: every object's colour, shape and motion, and the theme or the camera where there is room."""
    objects, tail = ordered(scene, rng, shuffle), ""
    body = listed([noun(o) + " " + verb(o, rng) for o in objects])
    claim = {"objects": [only(o, "colour", "shape", "motion") for o in objects]}
    theme, camera = mood(scene["theme"], rng), lens(scene["camera"], rng)
    if len((body + theme).split()) <= 24 and (len(body.split()) < 10 or rng.random() < 0.5):
        tail, claim["theme"] = theme, scene["theme"]
    if len((body + tail).split()) < 10:
        tail, claim["camera"] = tail + " while " + camera, scene["camera"]
    return sentence(body, tail), claim


def spatial(scene, rng, shuffle=False):
    """What things look like and where: size, texture, colour, shape, place and relations of every object; no motion."""
    objects = ordered(scene, rng, shuffle)
    looks = [only(o, "colour", "shape", "size", "texture", "place") for o in objects]
    claim = {"theme": scene["theme"], "objects": looks, "relations": []}
    parts = [
        sentence(rng.choice(("there is", "one sees")), noun(o, rng, o), "in the", o["place"])
        for o in objects
    ]
    for i, j in itertools.pairwise(range(len(objects))):
        claim["relations"].append(
            [i, rng.choice(relations(objects[i]["place"], objects[j]["place"])), j]
        )
        parts.append(
            sentence(
                "the",
                objects[i]["shape"],
                "is",
                claim["relations"][-1][1],
                noun(objects[j], article="the"),
            )
        )
    return " ".join([*parts, sentence("all this is", mood(scene["theme"], rng))]), claim


def temporal(scene, rng, shuffle=True):
    """How events unfold: every object's motions in order and the camera; no places."""
    objects = ordered(scene, rng, shuffle)
    parts = [sentence(noun(o, article=rng.choice(("a", "the"))), verb(o, rng)) for o in objects]
    parts.append(sentence(rng.choice(("meanwhile,", "during this,")), lens(scene["camera"], rng)))
    return " ".join(parts), {
        "objects": [only(o, "colour", "shape", "motion") for o in objects],
        "camera": scene["camera"],
    }


def rich(scene, rng, shuffle=False):
    """Up to 60 words: looks, places and motions of every object, then theme and camera."""
    objects = ordered(scene, rng, shuffle)
    keys = (
        ("size", "texture", "colour", "shape") if len(objects) < 3 else ("size", "colour", "shape")
    )
    parts = [sentence(noun(o, rng, keys), "in the", o["place"], verb(o, rng)) for o in objects]
    claim = {
        "objects": [only(o, *keys, "place", "motion") for o in objects],
        "theme": scene["theme"],
        "camera": scene["camera"],
    }
    if len(objects) == 2:
        claim["relations"] = [
            [0, rng.choice(relations(objects[0]["place"], objects[1]["place"])), 1]
        ]
        parts.append(
            sentence(
                "the",
                objects[0]["shape"],
                "is",
                claim["relations"][0][1],
                "the",
                objects[1]["shape"],
            )
        )
    return " ".join(
        [
            *parts,
            sentence("it happens", mood(scene["theme"], rng), "and", lens(scene["camera"], rng)),
        ]
    ), claim


def abstract(scene, rng, shuffle=False):
    """What it is about: the theme, how many things there are, which shapes, what the camera does; no colours."""
    count, mean = (
        ("one thing", "two things", "three things")[len(scene["objects"]) - 1],
        mood(scene["theme"], rng),
    )
    shapes = listed([noun(o, keys=("shape",)) for o in ordered(scene, rng, shuffle)])
    opening = rng.choice(("a quiet story", "a short study", "a little play")) + rng.choice(
        (" about ", " of ")
    )
    return (
        sentence(opening + count, mean)
        + " "
        + sentence("its theme is", shapes, "while", lens(scene["camera"], rng)),
        {**theme(scene, rng)[1], "camera": scene["camera"]},
    )


def theme(scene, rng):
    """Theme information alone: the place and light, and the shapes it is about."""
    shapes = listed([noun(o, keys=("shape",)) for o in ordered(scene, rng, True)])
    text = rng.choice(
        (
            "the theme is {s} {m}",
            "a scene {m} with the theme {s}",
            "the clip plays {m} and is about {s}",
        )
    )
    claim = {
        "theme": scene["theme"],
        "count": len(scene["objects"]),
        "objects": [only(o, "shape") for o in scene["objects"]],
    }
    return sentence(text.format(s=shapes, m=mood(scene["theme"], rng))), claim


def keywords(scene, rng, shuffle=False, still=False):
    """3-30 words, comma separated: theme and objects; with still=False also one motion of each and the camera's."""
    objects = ordered(scene, rng, shuffle)
    words, claim = (
        [scene["theme"]],
        {"theme": scene["theme"], "objects": [only(o, "colour", "shape") for o in objects]},
    )
    words += [o["colour"] + " " + o["shape"] for o in objects]
    if not still:
        for o, wanted in zip(objects, claim["objects"], strict=True):
            wanted["motion"] = o["motion"][:1]
            words.append(o["shape"] + " " + say(wanted["motion"], MOTIONS, rng))
        claim["camera"] = scene["camera"][:1]
        words.append("static camera" if scene["camera"] == ["static"] else scene["camera"][0])
    return ", ".join(words), claim


def partial(scene, rng, shuffle=False):
    """One event of several: a single object's single motion, nothing else."""
    o, keys = (
        rng.choice(scene["objects"]),
        rng.choice((("colour", "shape"), ("size", "colour", "shape"))),
    )
    event = {**only(o, *keys), "motion": [rng.choice(o["motion"])]}
    return sentence(
        rng.choice(("", "at one moment", "somewhere")), noun(o, rng, keys), verb(event, rng)
    ), {"objects": [event]}


def main_object(scene, rng):
    """The first object in reading order, in detail: looks, place, motion."""
    o = scene["objects"][0]
    text = (
        sentence("the main object is", noun(o, rng, o))
        + " "
        + sentence("it is in the", o["place"], "and", verb(o, rng))
    )
    return text, {"objects": [o]}


def camera(scene, rng):
    """What the camera does, over which place and which object."""
    o, claim = rng.choice(scene["objects"]), {"camera": scene["camera"], "theme": scene["theme"]}
    text = (
        sentence(lens(scene["camera"], rng))
        + " "
        + sentence("it films", noun(o), mood(scene["theme"], rng))
    )
    return text, {**claim, "objects": [only(o, "colour", "shape")]}


def paragraph(scene, rng):
    """Sentences about single events, joined, and the theme (DiDeMo's form)."""
    text, claim = temporal(scene, rng)
    return text + " " + sentence("it happens", mood(scene["theme"], rng)), {
        **claim,
        "theme": scene["theme"],
    }


def detail(scene, rng):
    """60-250 words: everything, object by object, then relation by relation, then event by event."""
    (look, claim), (events, _) = spatial(scene, rng, shuffle=True), temporal(scene, rng)
    whole = {o["colour"]: o for o in scene["objects"]}
    lines = [
        sentence(
            "this is a video of", ("one object", "two objects", "three objects")[len(whole) - 1]
        ),
        look,
        events,
    ]
    lines += [
        sentence(
            "looking at",
            noun(o, article="the"),
            "again, it is",
            rng.choice(SIZES[o["size"]]),
            "and",
            o["texture"] + ", stays near the",
            o["place"],
            "part and",
            verb(o, rng),
        )
        for o in ordered(scene, rng, True)
    ]
    lines.append(sentence("the place and the light say that it plays", mood(scene["theme"], rng)))
    claim["objects"] = [whole[o["colour"]] for o in claim["objects"]]
    return " ".join(lines), {**claim, "camera": scene["camera"], "count": len(whole)}


def story(video, rng):
    """A long video, up to 250 words: every scene in order, with its theme, objects, motions and camera."""
    parts, claims, keys = [], [], ("size", "colour", "shape")
    for start, scene in zip(
        ("first", "next", "after that", "at the end"), video["scenes"], strict=False
    ):
        objects = ordered(scene, rng, True)
        parts.append(sentence(start + ", the scene is", mood(scene["theme"], rng)))
        parts += [sentence(noun(o, rng, keys), "in the", o["place"], verb(o, rng)) for o in objects]
        parts.append(sentence(lens(scene["camera"], rng)))
        facts = [only(o, *keys, "place", "motion") for o in objects]
        claims.append({**only(scene, "theme", "camera"), "objects": facts})
    return " ".join(parts), {"scenes": claims}


def snapshot(scene, rng, shuffle=False):
    """A frame: theme, and every object with its place."""
    objects = ordered(scene, rng, shuffle)
    text = sentence(
        "a picture",
        mood(scene["theme"], rng),
        "with",
        listed([noun(o) + " in the " + o["place"] for o in objects]),
    )
    return text, {
        "theme": scene["theme"],
        "objects": [only(o, "colour", "shape", "place") for o in objects],
    }


def minimal(scene, rng, shuffle=False):
    """A frame: one object and its place."""
    o = rng.choice(scene["objects"])
    return sentence(noun(o), "in the", o["place"]), {
        "objects": [only(o, "colour", "shape", "place")]
    }


VIDEO_STYLES = {
    "concise": concise,
    "rich": rich,
    "abstract": abstract,
    "keywords": keywords,
    "partial": partial,
}
FRAME_STYLES = {  # only what one image proves: neither motion nor camera
    "concise": snapshot,
    "rich": spatial,
    "abstract": lambda scene, rng, shuffle=False: theme(scene, rng),
    "keywords": lambda scene, rng, shuffle=False: keywords(scene, rng, shuffle, still=True),
    "minimal": minimal,
}


def composed(twin, delta, rng):
    """The query that leads from a reference to its twin; the claim is the twin's objects and what became of them."""
    kind, to, the = delta["kind"], delta["to"], "the " + delta["object"]
    what = {
        "motion": lambda: the + " " + say(to, MOTIONS, rng),
        "place": lambda: the + " is in the " + to,
        "size": lambda: the + " is " + rng.choice(SIZES[to]),
        "camera": lambda: lens(to, rng),
        "theme": lambda: "it is " + mood(to, rng),
    }.get(kind, lambda: the + " is " + to)()
    claim = {"objects": [only(p, "colour", "shape") for p in twin["objects"]]}
    (
        claim
        if kind in ("camera", "theme")
        else next(p for p in claim["objects"] if p["shape"] == delta["object"])
    )[kind] = to
    forms = (
        "the same scene, but {} instead",
        "like this one, but now {}",
        "the same objects, only {} this time",
    )
    return sentence(rng.choice(forms).format(what)), claim


def read_events(text):
    """Read a concise caption back: {(colour, shape): [motions in the order told]}. Used to score what the base writes."""
    phrases = sorted(((p, m) for m, ps in MOTIONS.items() for p in ps), key=lambda pm: -len(pm[0]))
    found, current, words = {}, None, text.lower().replace(",", " ").replace(".", " ").split()
    while words:
        rest, skip = " ".join(words) + " ", 1
        if words[0] in COLOURS and words[1:2] and words[1] in SHAPES:
            current, skip = found.setdefault(tuple(words[:2]), []), 2
        elif words[0] in ("camera", "view"):
            current = None  # "the camera stands still" is no event of an object
        elif current is not None and (
            hit := next(((p, m) for p, m in phrases if rest.startswith(p + " ")), None)
        ):
            current.append(hit[1])
            skip = len(hit[0].split())
        words = words[skip:]
    return found
