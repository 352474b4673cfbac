"""The mini world: its pixels, its truths, its files, and what the committed base writes. Half a minute; -m slow for the last."""

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


@pytest.fixture(scope="module")
def groups():
    return bench.all_videos()


@pytest.fixture(scope="module")
def sets(groups):
    return bench.benchmark(groups)


@pytest.fixture(scope="module")
def rows(groups):
    return bench.training(groups)


def true_of(scene, claim):
    """The claim's truth by counting facts one by one, written apart from world.holds."""
    for key in ("theme", "camera"):
        if key in claim:
            wanted, actual = claim[key], scene[key]
            part = key == "camera" and len(wanted) == 1 and wanted[0] in actual
            if wanted != actual and not part:
                return False
    if "count" in claim and len(scene["objects"]) != claim["count"]:
        return False

    def fits(wanted, o):
        motion = wanted.get("motion", o["motion"])
        return all(o[k] == v for k, v in wanted.items() if k != "motion") and (
            o["motion"] == motion or len(motion) == 1 and motion[0] in o["motion"]
        )

    candidates = [
        [i for i, o in enumerate(scene["objects"]) if fits(w, o)] for w in claim.get("objects", [])
    ]
    for chosen in itertools.product(*candidates):
        if len(set(chosen)) < len(chosen):
            continue
        at = [world.PLACES[scene["objects"][i]["place"]] for i in chosen]
        side = {
            "left of": lambda a, b: a[0] < b[0],
            "right of": lambda a, b: a[0] > b[0],
            "above": lambda a, b: a[1] < b[1],
            "below": lambda a, b: a[1] > b[1],
        }
        if all(side[r](at[i], at[j]) for i, r, j in claim.get("relations", [])):
            return True
    return False


def video_true(video, claim):
    if "scenes" in claim:
        return [true_of(s, c) for s, c in zip(video["scenes"], claim["scenes"], strict=True)] == [
            True
        ] * len(video["scenes"])
    return any(true_of(s, claim) for s in video["scenes"])


def test_same_seed_same_pixels_same_bytes_and_other_seed_other_scene():
    one, two, other = (world.sample_scene(random.Random(s), test=True) for s in (5, 5, 6))
    assert one == two != other
    assert world.encode_mp4(world.render_scene(one)) == world.encode_mp4(world.render_scene(two))


def test_codec_keeps_colours():
    """At an object's centre the decoded colour is nearest to its own among the eight, in the first frame that shows it."""
    table, rng, seen = (
        np.array(list(world.COLOURS.values()), float),
        random.Random(0),
        collections.Counter(),
    )
    for _ in range(40):
        scene = world.sample_scene(rng, test=False, count=1)
        o = {**scene["objects"][0], "texture": "plain", "shape": "circle"}
        scene = {**scene, "objects": [o]}
        frames = world.decode_mp4(world.encode_mp4(world.render_scene(scene)))
        ((centre, _, shown),) = world.tracks(scene)
        first = int(np.flatnonzero(shown)[0])
        x, y = np.clip(centre[first].round().astype(int), 1, world.SIZE - 2)
        pixel = frames[first, y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
        seen[list(world.COLOURS)[int(np.abs(table - pixel).sum(1).argmin())] == o["colour"]] += 1
    assert seen[False] == 0, seen


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
        assert world.read_events(text) == {
            (o["colour"], o["shape"]): o["motion"] for o in scene["objects"]
        }, text


def test_every_change_makes_a_twin_that_the_query_fits_and_the_reference_does_not():
    rng, kinds = random.Random(2), collections.Counter()
    for _ in range(200):
        scene = world.sample_scene(rng, test=False, events=0.7)
        for kind in (
            "motion",
            "order",
            "exchange",
            "place",
            "size",
            "texture",
            "colour",
            "camera",
            "theme",
        ):
            if made := world.change(scene, kind, rng, test=False):
                text, claim = world.composed(*made, rng)
                assert true_of(made[0], claim), text
                kinds[kind, true_of(scene, claim)] += 1
    for kind in ("place", "size", "texture", "colour", "camera", "theme", "order"):
        assert kinds[kind, False] > 20 and not kinds[kind, True], kinds


def test_training_and_test_share_no_set_of_objects(groups):
    def objects(side):
        return {
            tuple(sorted((o["colour"], o["shape"]) for o in s["objects"]))
            for name, videos in groups.items()
            if name.startswith(side)
            for v in videos
            for s in v["scenes"]
        }

    assert not objects("train") & objects("test")


def test_positives_are_exactly_the_videos_that_satisfy_the_claim(sets):
    for name, (corpus, queries) in sets.items():
        by_id = {v["id"]: v for v in corpus}
        for query, right, wrong in queries[::4]:
            if "claim" in query:
                pool = [by_id[i] for i in right + wrong] if wrong else corpus
                assert {v["id"] for v in pool if video_true(v, query["claim"])} == set(right), (
                    name,
                    query,
                )


def test_datasets_have_their_sizes_lengths_and_number_of_positives(sets):
    assert list(sets) == list(uvrb.DATASETS)
    for name, (corpus, queries) in sets.items():
        dataset = uvrb.DATASETS[name]
        counts = [len(right) for _, right, _ in queries]
        assert (
            max(counts) <= {"R@1": 2, "R@10": 10, "P@1": 9}[dataset.metric] and min(counts) >= 1
        ), name
        if dataset.metric != "P@1":
            assert len(corpus) == (200 if dataset.corpus >= 1000 else 100)
        else:
            assert all(len(right) + len(wrong) == 10 for _, right, wrong in queries)
        assert all(
            len(q.get("text", "").split()) <= (250 if name in LONG else WORDS)
            for q, _, _ in queries
        ), name
        assert len({json.dumps(q) for q, _, _ in queries}) == len(queries)


def test_temporal_queries_have_near_twins_in_their_corpus(sets):
    """For CRB-T and CRB-S most right answers stand beside clips with the same objects that are wrong."""
    for name in ("CRB-T", "CRB-S", "CMRB"):
        corpus, queries = sets[name]
        things = {
            v["id"]: tuple(sorted((o["colour"], o["shape"]) for o in v["scenes"][0]["objects"]))
            for v in corpus
        }
        twins = [
            sum(things[i] == things[right[0]] for i in things) - len(right)
            for _, right, _ in queries
        ]
        assert np.mean([t >= 2 for t in twins]) > 0.9, (name, np.mean(twins))


def test_training_has_every_task_and_hard_negatives_that_the_query_does_not_fit(groups, rows):
    tasks = {bench.SOURCES[name].task for name in rows}
    assert tasks == {"T2T", "T2I", "TI2I", "T2V", "I2V", "V2V", "TI2V", "TV2V"}
    assert {train.LEVEL[task] for task in tasks} == {1, 2, 3, 4}
    videos = {v["id"]: v for vs in groups.values() for v in vs}
    for name in ("t2v-temporal", "tv2v"):
        for row in rows[name][:50]:
            assert len(row["negatives"]) == 2
            right, *wrong = (
                videos[Path(item["video"]).stem] for item in (row["positive"], *row["negatives"])
            )
            assert all(
                w["family"] == right["family"] and w["scenes"] != right["scenes"] for w in wrong
            )


def test_files_are_accepted_by_the_readers_and_rendering_twice_is_a_no_op(
    groups, sets, rows, tmp_path, monkeypatch
):
    """A world of 20 videos per group, written for real; the second call writes nothing, a lost file brings everything back."""
    few = {name: videos[:20] for name, videos in groups.items()}
    kept = {v["id"] for videos in few.values() for v in videos}

    def cut(corpus, queries):
        whole = [q for q in queries if set(q[1]) | set(q[2] or ()) <= kept and q[0].get("text")]
        return [v for v in corpus if v["id"] in kept], whole[:3] or [
            bench.Query({"text": "a star"}, [corpus[0]["id"]], None)
        ]

    small = {name: cut(*pair) for name, pair in sets.items()}
    monkeypatch.setattr(bench, "all_videos", lambda seed: few)
    monkeypatch.setattr(bench, "benchmark", lambda groups, seed: small)
    monkeypatch.setattr(
        bench, "training", lambda groups, seed: {name: source[:2] for name, source in rows.items()}
    )
    assert (
        bench.write(tmp_path, workers=1)["fresh"] and not bench.write(tmp_path, workers=1)["fresh"]
    )
    assert not list(tmp_path.rglob("*.part"))
    assert uvrb.benchmark(tmp_path / "uvrb")[0] == "mini-UVRB"
    for name, (_, queries) in small.items():
        read = uvrb.read(tmp_path / "uvrb", name)
        assert not read.missing and len(read.queries) == len(queries)
    assert len(load_mixture(tmp_path / "train" / "mixture.json")) == len(bench.SOURCES)
    lost = next((tmp_path / "videos").glob("*.mp4"))
    lost.unlink()
    assert bench.write(tmp_path, workers=1)["fresh"] and lost.is_file()


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


@pytest.mark.skipif(
    not (ROOT / "mini/base/config.json").is_file(),
    reason="mini/base is not there: python -m mini pretrain",
)
def test_base_and_prober_fit_into_four_megabytes():
    files = [
        f for part in ("base", "prober") for f in (ROOT / "mini" / part).rglob("*") if f.is_file()
    ]
    assert sum(f.stat().st_size for f in files) <= 4 * 1024**2


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "mini/base/config.json").is_file(),
    reason="mini/base is not there: python -m mini pretrain",
)
def test_base_names_colour_shape_and_motion_of_every_object():
    from mini.pretrain import caption_accuracy

    assert caption_accuracy(ROOT / "mini/base", n=100, show=0) >= 0.8
