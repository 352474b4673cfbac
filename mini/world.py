"""The rendered world: scene graphs, their pixels, and the texts that are true of them (DESIGN.md section 4).

A *video* is {"id", "scenes": [scene, ...]}; a *scene* is a plain JSON dict
    {"theme", "camera": [move] or [first, then], "objects": [object, ...], "seed"}
and an *object* {"colour", "shape", "size", "texture", "place", "motion": [motion] or [first, then]}. Within a scene no two objects share a
colour, a shape or a place. Nothing here has global state: the same `random.Random` gives the same scene, the same scene the same pixels.

A *caption* is (text, claim). The claim is the part of the scene graph that the text states, and `holds(scene, claim)` says whether another
scene satisfies it, so that relevance is computed and never guessed. Legend: F frames, S = 56 pixels.
"""

import io
import itertools
import zlib

import av
import numpy as np

SIZE, FPS, FRAMES = 56, 8, 16  # pixels per side, frames per second, frames of one scene
COLOURS = {"red": (225, 25, 35), "orange": (255, 135, 0), "yellow": (250, 230, 40), "green": (20, 190, 60),
           "blue": (35, 70, 245), "purple": (140, 30, 190), "pink": (255, 130, 200), "white": (250, 250, 250)}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
PLACES = {"top left": (15, 15), "top right": (41, 15), "bottom left": (15, 41), "bottom right": (41, 41)}  # centres, in reading order
MOTIONS = {  # every way a text may say it
    "still": ("stays still", "does not move", "rests in place"), "left": ("moves left", "slides to the left", "goes left"),
    "right": ("moves right", "slides to the right", "goes right"), "up": ("moves up", "rises", "goes up"),
    "down": ("moves down", "sinks", "goes down"), "grow": ("grows", "gets bigger"), "shrink": ("shrinks", "gets smaller"),
    "blink": ("blinks", "flashes on and off"), "loop": ("loops around", "goes round and round")}
CAMERAS = {
    "static": ("is static", "stands still"), "pan left": ("pans left", "turns to the left"), "pan right": ("pans right", "turns to the right"),
    "tilt up": ("tilts up", "looks upwards"), "tilt down": ("tilts down", "looks downwards"),
    "zoom in": ("zooms in", "comes closer"), "zoom out": ("zooms out", "backs away")}
THEMES = {  # ground colour, colour of its marks, marks, their radius in pixels; then the words
    "night": ((16, 18, 48), (150, 150, 110), 50, 1.6, ("at night", "under a dark night sky")),
    "sunset": ((150, 75, 60), (205, 125, 80), 22, 5.0, ("at sunset", "in the glow of a sunset")),
    "forest": ((30, 62, 34), (14, 34, 18), 34, 3.6, ("in a forest", "among the trees of a forest")),
    "snow": ((150, 160, 172), (205, 210, 218), 44, 2.2, ("in the snow", "on a day of winter snow")),
    "desert": ((172, 140, 92), (130, 100, 58), 26, 4.4, ("in a desert", "on the sand of a desert")),
    "ocean": ((22, 78, 112), (60, 128, 156), 32, 3.2, ("in the ocean", "under the water of the ocean")),
    "city": ((72, 72, 80), (122, 120, 104), 40, 2.6, ("in a city", "on the streets of a city")),
    "meadow": ((104, 132, 66), (150, 168, 90), 40, 2.6, ("on a meadow", "on the grass of a meadow"))}
SIZES = {"small": ("small", "little"), "big": ("big", "large")}
VISIBLE = (0, 1, 4, 5, 8, 9, 12, 13)  # frames in which even a blinking object is shown
VIDEO_STYLES = ("concise", "rich", "abstract", "keywords", "partial")
FRAME_STYLES = ("concise", "rich", "abstract", "keywords", "minimal")


def held_out(objects):
    """Say whether a set of objects (by colour and shape) belongs to the test side: a third of all sets, never shown in training."""
    key = ",".join(sorted(o["colour"] + " " + o["shape"] for o in objects))
    return zlib.crc32(key.encode()) % 3 == 0


def sample_motion(rng, two):
    """Draw one motion, or two different ones in order ("still" only stands alone)."""
    return rng.sample(list(MOTIONS)[1:], 2) if two else [rng.choice(list(MOTIONS))]


def sample_camera(rng, two=False):
    return rng.sample(list(CAMERAS)[1:], 2) if two else [rng.choice(list(CAMERAS))]


def sample_scene(rng, test, count=None, events=0.35):
    """Draw a scene of `count` objects (default 1-3, mostly 2) on the test or training side; `events` = chance of two ordered motions."""
    n = count or rng.choices((1, 2, 3), (2, 6, 2))[0]
    while True:
        colours, shapes, places = rng.sample(list(COLOURS), n), rng.sample(SHAPES, n), sorted(rng.sample(range(4), n))
        objects = [{"colour": c, "shape": s} for c, s in zip(colours, shapes, strict=True)]
        if held_out(objects) == test:
            break
    once = rng.randrange(n)  # of three objects only one has two motions: a caption of 25 words must hold them
    for i, o in enumerate(objects):
        o.update(size=rng.choice(list(SIZES)), texture=rng.choices(("plain", "striped"), (2, 1))[0], place=list(PLACES)[places[i]],
                 motion=sample_motion(rng, rng.random() < events and (n < 3 or i == once)))
    return {"theme": rng.choice(list(THEMES)), "camera": sample_camera(rng, rng.random() < 0.15), "objects": objects, "seed": rng.getrandbits(32)}


def change(scene, kind, rng, test):
    """Make a near-twin: the scene with one thing altered. Returns (twin, change), the change naming what became what.

    kinds: motion (an object moves otherwise), order (its two motions swap), exchange (two objects trade motions), place (two places swap
    or an object moves to a free one), size, texture, camera, theme, colour. Returns None where the kind does not apply.
    """
    twin = {**scene, "objects": [dict(o) for o in scene["objects"]], "seed": rng.getrandbits(32)}
    objects, i = twin["objects"], rng.randrange(len(scene["objects"]))
    o = objects[i]
    if kind == "motion":
        two = len(o["motion"]) == 2
        o["motion"] = rng.choice([m for m in (sample_motion(rng, two) for _ in range(20)) if not set(m) & set(o["motion"])])
    elif kind == "order":
        i = next((j for j, p in enumerate(objects) if len(p["motion"]) == 2), None)
        if i is None:
            return None
        o = objects[i]
        o["motion"] = o["motion"][::-1]
    elif kind == "exchange":
        if len(objects) < 2 or objects[0]["motion"] == objects[1]["motion"]:
            return None
        i, o = 0, objects[0]
        o["motion"], objects[1]["motion"] = objects[1]["motion"], o["motion"]
    elif kind == "place":
        new = rng.choice([p for p in PLACES if p != o["place"]])
        for p in objects:
            if p["place"] == new:
                p["place"] = o["place"]
        o["place"] = new
    elif kind in ("size", "texture"):
        o[kind] = {"small": "big", "big": "small", "plain": "striped", "striped": "plain"}[o[kind]]
    elif kind == "camera":
        twin["camera"] = rng.choice([c for c in (sample_camera(rng, rng.random() < 0.3) for _ in range(20)) if not set(c) & set(scene["camera"])])
    elif kind == "theme":
        twin["theme"] = rng.choice([t for t in THEMES if t != scene["theme"]])
    elif kind == "colour":
        old = dict(o)
        free = [c for c in COLOURS if c not in [p["colour"] for p in objects] and
                held_out([{**o, "colour": c}] + [p for p in objects if p is not o]) == test]
        if not free:
            return None
        o["colour"] = rng.choice(free)
        return twin, {"kind": kind, "object": {"shape": o["shape"]}, "to": o["colour"], "from": old["colour"]}
    to = twin[kind] if kind in ("camera", "theme") else o.get("motion" if kind in ("order", "exchange") else kind)
    return twin, {"kind": kind, "object": {k: o[k] for k in ("colour", "shape")}, "to": to}


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
        return np.minimum(np.maximum(abs(x) - r, abs(y) - 0.33 * r), np.maximum(abs(x) - 0.33 * r, abs(y) - r))
    if shape == "ring":
        return abs(d - 0.75 * r) - 0.28 * r
    return d - 1.15 * r * (0.66 + 0.34 * np.cos(5 * np.arctan2(x, -y)))  # star


def motion_path(motions):
    """Offsets (F, 2) in pixels around the object's place, radius factors (F,) and visibility (F,) of an object over one scene."""
    steps, grow, seen = np.zeros((FRAMES, 2)), np.zeros(FRAMES), np.ones(FRAMES, bool)
    for m, span in zip(motions, np.array_split(np.arange(FRAMES), len(motions)), strict=True):
        n = len(span)
        travel = 17 if len(motions) == 1 else 14
        if m in ("left", "right", "up", "down"):
            steps[span] = np.array({"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[m]) * travel / n
        elif m == "loop":
            angle = 2 * np.pi * np.arange(n) / n
            steps[span] = np.stack([-np.sin(angle), np.cos(angle)], 1) * 2 * np.pi * 7 / n
        elif m in ("grow", "shrink"):
            grow[span] = (1 if m == "grow" else -1) * 0.95 / n
        elif m == "blink":
            seen[span] = span // 2 % 2 == 0
    path, size = np.cumsum(steps, 0), np.cumsum(grow)
    return path - (path.max(0) + path.min(0)) / 2, np.exp(size - (size.max() + size.min()) / 2), seen


def background(scene):
    """A seamless texture (96, 96, 3) float: the theme's ground with its marks scattered by the scene's seed."""
    ground, mark, n, radius, _ = THEMES[scene["theme"]]
    rng = np.random.default_rng(scene["seed"])
    y, x = np.mgrid[:96, :96]
    cover = np.zeros((96, 96))
    for cx, cy in rng.uniform(0, 96, (n, 2)):
        dx, dy = abs(x - cx), abs(y - cy)
        cover = np.maximum(cover, np.clip(radius + 0.5 - np.hypot(np.minimum(dx, 96 - dx), np.minimum(dy, 96 - dy)), 0, 1))
    return np.array(ground) * (1 - cover[..., None]) + np.array(mark) * cover[..., None]


def tracks(scene):
    """Where every object is: a list of (centre (F, 2) in pixels, radius (F,), seen (F,) bool)."""
    jitter, out = np.random.default_rng(scene["seed"] + 1).uniform(-1.5, 1.5, (len(scene["objects"]), 2)), []
    for o, offset in zip(scene["objects"], jitter, strict=True):
        path, grow, seen = motion_path(o["motion"])
        out.append((PLACES[o["place"]] + path + offset, {"small": 6.0, "big": 9.0}[o["size"]] * grow, seen))
    return out


def camera_step(scene, f):
    """What the camera does in frame f: (right, down) in pixels and the logarithm of the zoom."""
    move = scene["camera"][f * len(scene["camera"]) // FRAMES]
    return {"pan left": (-2, 0, 0), "pan right": (2, 0, 0), "tilt up": (0, -2, 0), "tilt down": (0, 2, 0), "zoom in": (0, 0, 0.065),
            "zoom out": (0, 0, -0.065)}.get(move, (0, 0, 0))


def render_scene(scene):
    """Draw a scene: uint8 (F=16, S, S, 3). The camera moves over the background; objects keep their place on the screen."""
    ys, xs = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    texture, paths, camera, frames = background(scene), tracks(scene), np.zeros(3), []
    for f in range(FRAMES):
        camera += camera_step(scene, f)
        u, v = (xs - 28) * np.exp(-camera[2]) + 48 + camera[0], (ys - 28) * np.exp(-camera[2]) + 48 + camera[1]
        iu, iv = np.floor(u).astype(int), np.floor(v).astype(int)
        fu, fv = (u - iu)[..., None], (v - iv)[..., None]
        at = lambda du, dv: texture[(iv + dv) % 96, (iu + du) % 96]  # noqa: E731, B023  used at once
        image = (at(0, 0) * (1 - fu) + at(1, 0) * fu) * (1 - fv) + (at(0, 1) * (1 - fu) + at(1, 1) * fu) * fv
        for o, (centre, radius, seen) in zip(scene["objects"], paths, strict=True):
            if not seen[f]:
                continue
            x, y = xs - centre[f, 0], ys - centre[f, 1]
            d = shape_distance(o["shape"], x, y, radius[f])
            image *= 1 - 0.75 * np.clip(1.7 - d, 0, 1)[..., None]  # a dark rim, so that no colour melts into its theme
            paint = np.array(COLOURS[o["colour"]], float) * np.ones((SIZE, SIZE, 1))
            if o["texture"] == "striped":
                paint *= 1 - 0.5 * (np.sin((x + y) * 1.3) > 0)[..., None]
            alpha = np.clip(0.5 - d, 0, 1)[..., None]
            image = image * (1 - alpha) + paint * alpha
        frames.append(image)
    return np.clip(np.stack(frames) + 0.5, 0, 255).astype(np.uint8)


def render(video):
    """All frames of a video, uint8 (F, S, S, 3); scenes follow each other without a gap."""
    return np.concatenate([render_scene(s) for s in video["scenes"]])


def encode_mp4(frames):
    """H.264 mp4 bytes of uint8 (F, S, S, 3); one thread and no B-frames, so that the same frames give the same bytes."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as box:
        stream = box.add_stream("libx264", rate=FPS, options={"crf": "14", "preset": "veryfast", "bf": "0", "threads": "1"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            box.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        box.mux(stream.encode())
    return out.getvalue()


def decode_mp4(source):
    """All frames uint8 (F, S, S, 3) of mp4 bytes or a path."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as box:
        return np.stack([f.to_ndarray(format="rgb24") for f in box.decode(video=0)])


# Truth

def relations(a, b):
    """The relations that place a stands in to place b: "left of", "right of", "above", "below"."""
    (ax, ay), (bx, by) = PLACES[a], PLACES[b]
    return [r for r, true in (("left of", ax < bx), ("right of", ax > bx), ("above", ay < by), ("below", ay > by)) if true]


def said(claimed, actual):
    """One claimed move is true if it occurs ("rises" of what rises and then blinks); two claimed moves must be all, in order."""
    return claimed[0] in actual if len(claimed) == 1 else claimed == actual


def holds(scene, claim):
    """Say whether a scene satisfies a claim: some assignment of its objects fits every object and relation claimed, and theme and camera fit."""
    if "theme" in claim and claim["theme"] != scene["theme"] or "camera" in claim and not said(claim["camera"], scene["camera"]):
        return False
    wanted = claim.get("objects", [])
    if "count" in claim and claim["count"] != len(scene["objects"]):
        return False
    return any(all(said(v, o[k]) if k == "motion" else o[k] == v for w, o in zip(wanted, pick, strict=True) for k, v in w.items()) and
               all(r in relations(pick[i]["place"], pick[j]["place"]) for i, r, j in claim.get("relations", []))
               for pick in itertools.permutations(scene["objects"], len(wanted)))


def satisfies(video, claim):
    """Say whether a video satisfies a claim: {"scenes": [claims]} scene by scene, any other claim in any one of its scenes."""
    if "scenes" in claim:
        return len(claim["scenes"]) == len(video["scenes"]) and all(map(holds, video["scenes"], claim["scenes"]))
    return any(holds(s, claim) for s in video["scenes"])


# Words

def noun(o, rng=None, keys=("colour", "shape"), article="a"):
    """Name an object by the keys given: "a little striped red star"."""
    words = [rng.choice(SIZES[o["size"]]) if "size" in keys else "", o["texture"] if "texture" in keys else "",
             o["colour"] if "colour" in keys else "", o["shape"] if "shape" in keys else "thing"]
    words = " ".join(w for w in words if w)
    return ("an " if article == "a" and words[0] in "aeiou" else article + " ") + words


def verb(motion, rng):
    """Say what an object does: "rises", "first rises, then blinks"."""
    said_ = [rng.choice(MOTIONS[m]) for m in motion]
    return said_[0] if len(said_) == 1 else rng.choice(("first {}, then {}", "{} and then {}", "{} before it {}")).format(*said_)


def lens(camera, rng):
    """Say what the camera does: "the camera first pans left, then zooms in"."""
    moves = [rng.choice(CAMERAS[c]) for c in camera]
    return rng.choice(("the camera ", "the view ")) + (moves[0] if len(moves) == 1 else rng.choice(("first {}, then {}", "{} and then {}")).format(*moves))


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
    objects, claim = ordered(scene, rng, shuffle), {}
    body = listed([noun(o) + " " + verb(o["motion"], rng) for o in objects])
    claim["objects"] = [only(o, "colour", "shape", "motion") for o in objects]
    theme, camera, tail = mood(scene["theme"], rng), lens(scene["camera"], rng), ""
    if len((body + theme).split()) <= 24 and (len(body.split()) < 10 or rng.random() < 0.5):
        tail, claim["theme"] = theme, scene["theme"]
    if len((body + tail).split()) < 10:
        tail, claim["camera"] = tail + " while " + camera, scene["camera"]
    return sentence(body, tail), claim


def spatial(scene, rng, shuffle=False, theme=True):
    """What things look like and where: size, texture, colour, shape, place and relations of every object; no motion."""
    objects = ordered(scene, rng, shuffle)
    claim = {"objects": [only(o, "colour", "shape", "size", "texture", "place") for o in objects], "relations": []}
    parts = [sentence(rng.choice(("there is", "one sees")), noun(o, rng, o), "in the", o["place"]) for o in objects]
    for i, j in itertools.pairwise(range(len(objects))):
        r = rng.choice(relations(objects[i]["place"], objects[j]["place"]))
        parts.append(sentence("the", objects[i]["shape"], "is", r, noun(objects[j], article="the")))
        claim["relations"].append([i, r, j])
    if theme:
        parts.append(sentence("all this is", mood(scene["theme"], rng)))
        claim["theme"] = scene["theme"]
    return " ".join(parts), claim


def temporal(scene, rng, shuffle=True):
    """How events unfold: every object's motions in order and the camera; no places."""
    objects = ordered(scene, rng, shuffle)
    parts = [sentence(noun(o, article=rng.choice(("a", "the"))), verb(o["motion"], rng)) for o in objects]
    parts.append(sentence(rng.choice(("meanwhile", "during this")) + ",", lens(scene["camera"], rng)))
    return " ".join(parts), {"objects": [only(o, "colour", "shape", "motion") for o in objects], "camera": scene["camera"]}


def rich(scene, rng, shuffle=False):
    """Up to 60 words: looks, places and motions of every object, then theme and camera."""
    objects = ordered(scene, rng, shuffle)
    keys = ("size", "texture", "colour", "shape") if len(objects) < 3 else ("size", "colour", "shape")
    parts = [sentence(noun(o, rng, keys), "in the", o["place"], verb(o["motion"], rng)) for o in objects]
    claim = {"objects": [only(o, *keys, "place", "motion") for o in objects], "theme": scene["theme"], "camera": scene["camera"]}
    if len(objects) == 2:
        r = rng.choice(relations(objects[0]["place"], objects[1]["place"]))
        parts.append(sentence("the", objects[0]["shape"], "is", r, "the", objects[1]["shape"]))
        claim["relations"] = [[0, r, 1]]
    parts.append(sentence("it happens", mood(scene["theme"], rng), "and", lens(scene["camera"], rng)))
    return " ".join(parts), claim


def abstract(scene, rng, shuffle=False):
    """Theme first: where it plays, how many things there are, which shapes, what the camera does; no colours."""
    objects = ordered(scene, rng, shuffle)
    count = ("one thing", "two things", "three things")[len(objects) - 1]
    opening = rng.choice(("a quiet story", "a short study", "a little play")) + " " + rng.choice(("about", "of")) + " " + count
    shapes = listed([noun(o, keys=("shape",)) for o in objects])
    text = sentence(opening, mood(scene["theme"], rng)) + " " + sentence("its theme is", shapes, "while", lens(scene["camera"], rng))
    return text, {"theme": scene["theme"], "count": len(objects), "camera": scene["camera"], "objects": [only(o, "shape") for o in objects]}


def theme(scene, rng):
    """Theme information alone: the place and light, and the shapes it is about."""
    text = rng.choice(("the theme is {s} {m}", "a scene {m} with the theme {s}", "the clip plays {m} and is about {s}"))
    shapes = listed([noun(o, keys=("shape",)) for o in ordered(scene, rng, True)])
    claim = {"theme": scene["theme"], "count": len(scene["objects"]), "objects": [only(o, "shape") for o in scene["objects"]]}
    return sentence(text.format(s=shapes, m=mood(scene["theme"], rng))), claim


def keywords(scene, rng, shuffle=False, extra=True):
    """5-30 words, comma separated: theme, objects, motions, camera."""
    objects = ordered(scene, rng, shuffle)
    words = [scene["theme"]] + [o["colour"] + " " + o["shape"] for o in objects]
    claim = {"theme": scene["theme"], "objects": [only(o, "colour", "shape") for o in objects]}
    if extra:
        for o, w in zip(objects, claim["objects"], strict=True):
            words.append(o["shape"] + " " + ", ".join(rng.choice(MOTIONS[m]) for m in o["motion"][:1]))
            w["motion"] = o["motion"][:1]
        words += scene["camera"][:1] if scene["camera"] != ["static"] else ["static camera"]
        claim["camera"] = scene["camera"][:1]
    return ", ".join(words), claim


def partial(scene, rng):
    """One event of several: a single object's single motion, nothing else."""
    o = rng.choice(scene["objects"])
    m = [rng.choice(o["motion"])]
    keys = rng.choice((("colour", "shape"), ("size", "colour", "shape")))
    text = rng.choice(("{} {}", "at one moment {} {}", "somewhere {} {}")).format(noun(o, rng, keys), verb(m, rng))
    return sentence(text), {"objects": [{**only(o, *keys), "motion": m}]}


def main_object(scene, rng):
    """The first object in reading order, in detail: looks, place, motion."""
    o = scene["objects"][0]
    text = sentence("the main object is", noun(o, rng, o)) + " " + sentence("it is in the", o["place"], "and", verb(o["motion"], rng))
    return text, {"objects": [dict(o)]}


def camera(scene, rng):
    """What the camera does, over which place and which object."""
    o = rng.choice(scene["objects"])
    text = sentence(lens(scene["camera"], rng)) + " " + sentence("it films", noun(o), mood(scene["theme"], rng))
    return text, {"camera": scene["camera"], "theme": scene["theme"], "objects": [only(o, "colour", "shape")]}


def detail(scene, rng):
    """60-250 words: everything, object by object, then relation by relation, then event by event."""
    look, claim = spatial(scene, rng, shuffle=True)
    events, more = temporal(scene, rng)
    claim["camera"] = more["camera"]
    for o in claim["objects"]:
        o["motion"] = next(p["motion"] for p in scene["objects"] if p["colour"] == o["colour"])
    lines = [sentence("this is a video of", ("one object", "two objects", "three objects")[len(scene["objects"]) - 1]), look, events]
    for o in ordered(scene, rng, True):
        lines.append(sentence("looking at", noun(o, article="the"), "again, it is", rng.choice(SIZES[o["size"]]), "and", o["texture"] + ",",
                              "stays near the", o["place"], "part and", verb(o["motion"], rng)))
    lines.append(sentence("the place and the light say that it plays", mood(scene["theme"], rng)))
    return " ".join(lines), {**claim, "count": len(scene["objects"])}


def story(video, rng):
    """A long video, up to 250 words: every scene in order, with its theme, objects and motions."""
    parts, claims = [], []
    for i, scene in enumerate(video["scenes"]):
        objects = ordered(scene, rng, True)
        start = ("first", "next", "after that", "at the end")[min(i, 3)]
        parts.append(sentence(start + ", the scene is", mood(scene["theme"], rng)))
        parts += [sentence(noun(o, rng, ("size", "colour", "shape")), "in the", o["place"], verb(o["motion"], rng)) for o in objects]
        parts.append(sentence(lens(scene["camera"], rng)))
        claims.append({"theme": scene["theme"], "camera": scene["camera"], "objects": [only(o, "size", "colour", "shape", "place", "motion") for o in objects]})
    return " ".join(parts), {"scenes": claims}


def frame_caption(scene, style, rng, shuffle=False):
    """Describe a single frame in one of FRAME_STYLES: only what one image proves, so neither motion nor camera."""
    objects = ordered(scene, rng, shuffle)
    if style == "rich":
        return spatial(scene, rng, shuffle)
    if style == "abstract":
        return theme(scene, rng)
    if style == "keywords":
        return keywords(scene, rng, shuffle, extra=False)
    if style == "minimal":
        o = rng.choice(objects)
        return sentence(noun(o), "in the", o["place"]), {"objects": [only(o, "colour", "shape", "place")]}
    text = sentence("a picture", mood(scene["theme"], rng), "with", listed([noun(o) + " in the " + o["place"] for o in objects]))
    return text, {"theme": scene["theme"], "objects": [only(o, "colour", "shape", "place") for o in objects]}


def video_caption(scene, style, rng, shuffle=False):
    """Describe a scene in one of VIDEO_STYLES. Returns (text, claim)."""
    if style == "partial":
        return partial(scene, rng)
    return {"concise": concise, "rich": rich, "abstract": abstract, "keywords": keywords}[style](scene, rng, shuffle)


def composed(twin, delta, rng):
    """Write the query that leads from a reference to its twin. Returns (text, claim): the objects of the twin, and what became of them."""
    kind, o, to = delta["kind"], delta["object"], delta["to"]
    the = "the " + o["shape"]
    if kind in ("motion", "order", "exchange"):
        what = the + " " + verb(to, rng)
    elif kind == "place":
        what = the + " is in the " + to
    elif kind in ("size", "texture", "colour"):
        what = the + " is " + (rng.choice(SIZES[to]) if kind == "size" else to)
    else:
        what = lens(to, rng) if kind == "camera" else "it is " + mood(to, rng)
    text = rng.choice(("the same scene, but {} instead", "like this one, but now {}", "the same objects, only {} this time")).format(what)
    claim = {"objects": [only(p, "colour", "shape") for p in twin["objects"]]}
    if kind in ("camera", "theme"):
        claim[kind] = to
    else:
        key = "motion" if kind in ("order", "exchange") else kind
        next(p for p in claim["objects"] if p["shape"] == o["shape"])[key] = to
    return sentence(text), claim


def read_events(text):
    """Read a concise caption back: {(colour, shape): [motions in the order told]}. Used to score what the base writes."""
    phrases = sorted(((p, m) for m, ps in MOTIONS.items() for p in ps), key=lambda pm: -len(pm[0]))
    found, current, i, words = {}, None, 0, text.lower().replace(",", " ").replace(".", " ").split()
    while i < len(words):
        rest = " ".join(words[i:]) + " "
        if words[i] in COLOURS and i + 1 < len(words) and words[i + 1] in SHAPES:
            current, i = (words[i], words[i + 1]), i + 2
            found[current] = []
            continue
        if words[i] in ("camera", "view"):
            current = None  # "the camera stands still" is no event of an object
        hit = next(((p, m) for p, m in phrases if rest.startswith(p + " ")), None)
        if hit and current:
            found[current].append(hit[1])
        i += len(hit[0].split()) if hit else 1
    return found
