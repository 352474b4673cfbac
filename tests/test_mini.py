"""The mini world: pixels, truths, files, the committed base. Half a minute; -m slow: captions."""

import collections
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import uvrb
from data import load_mixture
from mini import bench, world

ROOT = Path(__file__).resolve().parent.parent
WORDS = 60  # short forms; the long-context sets may have 250
LONG = ("LoVR-V", "VDC-D")
needs_base = pytest.mark.skipif(
    not (ROOT / "mini/base/config.json").is_file(),
    reason="mini/base is not there: python -m mini pretrain",
)


@pytest.fixture(scope="module")
def groups():
    return bench.all_videos()


@pytest.fixture(scope="module")
def sets(groups):
    return bench.benchmark(groups)


@pytest.fixture(scope="module")
def rows(groups):
    return bench.training(groups)


def moves_true(wanted, actual):
    return wanted == actual or (len(wanted) == 1 and wanted[0] in actual)


def object_true(wanted, o):
    for key, value in wanted.items():
        if key == "motion" and not moves_true(value, o["motion"]):
            return False
        if key != "motion" and o[key] != value:
            return False
    return True


def relation_true(relation, a, b):
    if relation == "left of":
        return a[0] < b[0]
    if relation == "right of":
        return a[0] > b[0]
    if relation == "above":
        return a[1] < b[1]
    assert relation == "below"
    return a[1] > b[1]


def true_of(scene, claim):
    """The claim's truth by counting facts one by one, written apart from world.holds."""
    if "theme" in claim and claim["theme"] != scene["theme"]:
        return False
    if "camera" in claim and not moves_true(claim["camera"], scene["camera"]):
        return False
    if "count" in claim and len(scene["objects"]) != claim["count"]:
        return False

    # For each claimed object, the indices of all objects that it may be.
    candidates = []
    for wanted in claim.get("objects", []):
        candidates.append([i for i, o in enumerate(scene["objects"]) if object_true(wanted, o)])
    for chosen in itertools.product(*candidates):
        if len(set(chosen)) < len(chosen):
            continue
        at = [world.PLACES[scene["objects"][i]["place"]] for i in chosen]
        claimed = claim.get("relations", [])
        if all(relation_true(relation, at[i], at[j]) for i, relation, j in claimed):
            return True
    return False


def video_true(video, claim):
    if "scenes" in claim:
        pairs = zip(video["scenes"], claim["scenes"], strict=True)
        return all(true_of(scene, part) for scene, part in pairs)
    return any(true_of(scene, claim) for scene in video["scenes"])


def names_of(scene):
    """The set of a scene's objects, by colour and shape."""
    return tuple(sorted((o["colour"], o["shape"]) for o in scene["objects"]))


def test_same_seed_same_pixels_same_bytes_and_other_seed_other_scene():
    one = world.sample_scene(random.Random(5), test=True)
    two = world.sample_scene(random.Random(5), test=True)
    other = world.sample_scene(random.Random(6), test=True)
    assert one == two != other
    assert world.encode_mp4(world.render_scene(one)) == world.encode_mp4(world.render_scene(two))


def test_codec_keeps_colours():
    """At an object's centre the decoded colour is nearest to its own among the eight.

    Read from the first frame that shows the object.
    """
    table = np.array(list(world.COLOURS.values()), float)
    rng = random.Random(0)
    wrong = []
    for _ in range(40):
        scene = world.sample_scene(rng, test=False, count=1)
        o = {**scene["objects"][0], "texture": "plain", "shape": "circle"}
        scene = {**scene, "objects": [o]}
        frames = world.decode_mp4(world.encode_mp4(world.render_scene(scene)))
        ((centre, _, shown),) = world.tracks(scene)
        first = int(np.flatnonzero(shown)[0])
        x, y = np.clip(centre[first].round().astype(int), 1, world.SIZE - 2)
        pixel = frames[first, y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
        nearest = list(world.COLOURS)[int(np.abs(table - pixel).sum(1).argmin())]
        if nearest != o["colour"]:
            wrong.append((nearest, o["colour"]))
    assert not wrong, wrong


def test_every_caption_claims_only_true_things_and_motions_can_be_read_back():
    rng = random.Random(1)
    forms = [
        *world.VIDEO_STYLES.values(),
        *world.FRAME_STYLES.values(),
        world.spatial,
        world.temporal,
        world.paragraph,
        world.main_object,
        world.camera,
        world.theme,
        world.detail,
    ]
    for _ in range(300):
        scene = world.sample_scene(rng, test=rng.random() < 0.5)
        for form in forms:
            text, claim = form(scene, rng)
            assert true_of(scene, claim), (form.__name__, text, claim)
            assert len(text.split()) <= (250 if form is world.detail else WORDS), text
        text, _ = world.concise(scene, rng)
        events = {(o["colour"], o["shape"]): o["motion"] for o in scene["objects"]}
        assert world.read_events(text) == events, text


def test_every_change_makes_a_twin_that_the_query_fits_and_the_reference_does_not():
    rng = random.Random(2)
    kinds = "motion order exchange place size texture colour camera theme".split()
    counts = collections.Counter()
    for _ in range(200):
        scene = world.sample_scene(rng, test=False, events=0.7)
        for kind in kinds:
            made = world.change(scene, kind, rng, test=False)
            if made:
                text, claim = world.composed(*made, rng)
                assert true_of(made[0], claim), text
                counts[kind, true_of(scene, claim)] += 1
    # A new motion, or an exchanged one, may be true of the reference as well.
    for kind in ("place", "size", "texture", "colour", "camera", "theme", "order"):
        assert counts[kind, False] > 20 and not counts[kind, True], counts


def test_training_and_test_share_no_set_of_objects(groups):
    def objects(side):
        found = set()
        for name, videos in groups.items():
            if name.startswith(side):
                for video in videos:
                    found |= {names_of(scene) for scene in video["scenes"]}
        return found

    assert not objects("train") & objects("test")


def test_positives_are_exactly_the_videos_that_satisfy_the_claim(sets):
    for name, (corpus, queries) in sets.items():
        by_id = {v["id"]: v for v in corpus}
        for query, right, wrong in queries[::4]:
            if "claim" in query:
                pool = [by_id[i] for i in right + wrong] if wrong else corpus
                true = {v["id"] for v in pool if video_true(v, query["claim"])}
                assert true == set(right), (name, query)


def test_datasets_have_their_sizes_lengths_and_number_of_positives(sets):
    assert list(sets) == list(uvrb.DATASETS)
    for name, (corpus, queries) in sets.items():
        dataset = uvrb.DATASETS[name]
        most = {"R@1": 2, "R@10": 10, "P@1": 9}[dataset.metric]
        most_words = 250 if name in LONG else WORDS
        for query, right, wrong in queries:
            assert 1 <= len(right) <= most, name
            assert len(query.get("text", "").split()) <= most_words, name
            if dataset.metric == "P@1":
                assert len(right) + len(wrong) == 10
        if dataset.metric != "P@1":
            assert len(corpus) == (200 if dataset.corpus >= 1000 else 100)
        assert len({json.dumps(query) for query, _, _ in queries}) == len(queries)


def test_temporal_queries_have_near_twins_in_their_corpus(sets):
    """Most right answers of three datasets stand beside wrong clips with the same objects."""
    for name in ("CRB-T", "CRB-S", "CMRB"):
        corpus, queries = sets[name]
        things = {video["id"]: names_of(video["scenes"][0]) for video in corpus}
        size_of_family = collections.Counter(things.values())
        twins = []
        for _, right, _ in queries:
            twins.append(size_of_family[things[right[0]]] - len(right))
        assert np.mean(np.array(twins) >= 2) > 0.9, (name, np.mean(twins))


def test_training_has_every_task_and_hard_negatives_that_the_query_does_not_fit(groups, rows):
    tasks = {bench.SOURCES[name].task for name in rows}
    assert tasks == {"T2T", "T2I", "TI2I", "T2V", "I2V", "V2V", "TI2V", "TV2V"}
    assert {train.LEVEL[task] for task in tasks} == {1, 2, 3, 4}
    videos = {}
    for group in groups.values():
        videos |= {video["id"]: video for video in group}
    for name in ("t2v-temporal", "tv2v"):
        for row in rows[name][:50]:
            assert len(row["negatives"]) == 2
            right = videos[Path(row["positive"]["video"]).stem]
            for item in row["negatives"]:
                wrong = videos[Path(item["video"]).stem]
                assert wrong["family"] == right["family"]
                assert wrong["scenes"] != right["scenes"]


def test_files_are_accepted_by_the_readers_and_rendering_twice_is_a_no_op(
    groups, sets, rows, tmp_path, monkeypatch
):
    """A world of 20 videos per group, written for real.

    The second call writes nothing; a lost file brings everything back.
    """
    few = {name: videos[:20] for name, videos in groups.items()}
    few_rows = {name: source[:2] for name, source in rows.items()}
    kept = set()
    for videos in few.values():
        kept |= {video["id"] for video in videos}

    def cut(corpus, queries):
        whole = []
        for query in queries:
            ids = {*query.positives, *(query.negatives or ())}
            if ids <= kept and query.row.get("text"):
                whole.append(query)
        spare = bench.Query({"text": "a star"}, [corpus[0]["id"]], None)
        return [video for video in corpus if video["id"] in kept], whole[:3] or [spare]

    small = {name: cut(*pair) for name, pair in sets.items()}
    monkeypatch.setattr(bench, "all_videos", lambda seed: few)
    monkeypatch.setattr(bench, "benchmark", lambda groups, seed: small)
    monkeypatch.setattr(bench, "training", lambda groups, seed: few_rows)
    assert bench.write(tmp_path, workers=1)["fresh"]
    assert not bench.write(tmp_path, workers=1)["fresh"]
    assert not list(tmp_path.rglob("*.part"))
    assert uvrb.benchmark(tmp_path / "uvrb")[0] == "mini-UVRB"
    for name, (_, queries) in small.items():
        read = uvrb.read(tmp_path / "uvrb", name)
        assert not read.missing and len(read.queries) == len(queries)
    assert len(load_mixture(tmp_path / "train" / "mixture.json")) == len(bench.SOURCES)
    lost = next((tmp_path / "videos").glob("*.mp4"))
    lost.unlink()
    assert bench.write(tmp_path, workers=1)["fresh"] and lost.is_file()


@needs_base
def test_the_bases_chat_template_is_made_from_the_prompts_pieces():
    from mini.pretrain import make_chat_template

    assert make_chat_template() == (ROOT / "mini/base/chat_template.jinja").read_text()


def test_our_patches_are_those_of_transformers_processor():
    from mini.pretrain import build_processor, patches

    frames = world.render_scene(world.sample_scene(random.Random(3), test=False))[:8]
    made = build_processor(["a b"] * 9).video_processor(
        videos=[torch.from_numpy(frames).movedim(-1, 1)],
        do_sample_frames=False,
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )
    assert made["video_grid_thw"].tolist() == [[4, 4, 4]]
    error = (made["pixel_values_videos"] - patches(frames[None])).abs()
    assert error.max() < 1e-5, (error.max(), error.mean())


@needs_base
def test_base_and_prober_fit_into_four_megabytes():
    files = [*(ROOT / "mini/base").rglob("*"), *(ROOT / "mini/prober").rglob("*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 4 * 1024**2


@pytest.mark.slow
@needs_base
def test_base_names_colour_shape_and_motion_of_every_object():
    from mini.pretrain import caption_accuracy

    assert caption_accuracy(ROOT / "mini/base", n=100, show=0) >= 0.8
