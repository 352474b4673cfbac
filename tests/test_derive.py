"""`uvrb.py derive`: a small file of each upstream format, read back by uvrb.read; DREAM-1K in its real structure."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
from conftest import moving_square, write_video
from test_convert import write, write_tar

import uvrb
from eval import ceiling
from extras import derive as command


def derive(tmp_path, name, source, *flags):
    """Derive and read back -> ([(query item, positives, pool)], corpus names, provenance), names relative to the dataset."""
    command.main([name, str(source), str(tmp_path / "out"), *map(str, flags)])
    bench = uvrb.read(tmp_path / "out", name)  # raises on any bad row
    base = str((tmp_path / "out" / name).resolve()) + "/"
    names = [row["item"]["video"].removeprefix(base) for row in bench.corpus]
    rows = []
    for i, row in enumerate(bench.queries):
        item = json.loads(json.dumps(row["item"]).replace(base, ""))
        pool = [names[j] for j in bench.pools[i]] if bench.pools else None
        rows.append((item, [names[j] for j in bench.positives[i]], pool))
    return rows, names, json.loads((tmp_path / "out" / name / "provenance.json").read_text())


@pytest.mark.parametrize(
    "name, file, content, expected",
    [
        (
            "MSRVTT",
            "JSFUSION.csv",
            "key,vid_key,video_id,sentence\nret0,msr9770,video9770,a person is connecting\n"
            'ret1,msr9771,video9771,"one, two"\n',
            [("a person is connecting", "video9770.mp4"), ("one, two", "video9771.mp4")],
        ),
        (
            "MSRVTT",
            "msrvtt_test_1k.json",
            [{"video_id": "video9770", "video": "video9770.mp4", "caption": "a person"}],
            [("a person", "video9770.mp4")],
        ),
        (
            "DiDeMo",
            "test_data.json",
            [
                {
                    "annotation_id": i,
                    "description": text,
                    "dl_link": "u",
                    "num_segments": 6,
                    "times": [[0, i]],
                    "video": video,
                }
                for i, (text, video) in enumerate(
                    (
                        ("first cat", "1@N01_2_3.avi"),
                        ("a dog", "4@N01_5_6.mov"),
                        ("then it sleeps", "1@N01_2_3.avi"),
                    )
                )
            ],
            [("first cat then it sleeps", "1@N01_2_3.avi"), ("a dog", "4@N01_5_6.mov")],
        ),
        (
            "DiDeMo",
            "didemo_test.json",
            [{"video": "1.mp4", "caption": "all of it"}],
            [("all of it", "1.mp4")],
        ),
        *(
            (
                name,
                "metadata.json",
                [
                    {
                        "video": "v_00000030_5.mp4",
                        "caption": "general",
                        "spatial_caption": "left of",
                        "temporal_caption": "and then",
                        "category": "x",
                    }
                ],
                [(text, "v_00000030_5.mp4")],
            )
            for name, text in (("CRB-G", "general"), ("CRB-S", "left of"), ("CRB-T", "and then"))
        ),
        *(
            (
                name,
                "VDC_1k.jsonl",
                [
                    {
                        "video_name": "0/ab-cd.mp4",
                        "short_caption": "s",
                        "background_caption": "b",
                        "video_source": "x",
                        "camera_caption": "c",
                        "main_object_caption": "an object",
                        "detailed_caption": "long",
                    }
                ],
                [(text, "0/ab-cd.mp4")],
            )
            for name, text in (("VDC-O", "an object"), ("VDC-D", "long"))
        ),
        (
            "CMRB",
            "test.jsonl",
            [
                {
                    "path": "videos/0TqQje61Hoo.3.1.mp4",
                    "labels": ["pan"],
                    "Video": "u.gif",
                    "caption": "It pans.",
                }
            ],
            [("It pans.", "videos/0TqQje61Hoo.3.1.mp4")],
        ),
        (
            "LoVR-TH",
            "clip_test.parquet",
            [{"clip_id": "a-Scene-001", "clip_path": "clips/a/a-Scene-001.mp4", "theme": "tea"}],
            [("tea", "clips/a/a-Scene-001.mp4")],
        ),
        (
            "LoVR-V",
            "all_video.jsonl",
            [{"vid": "abc", "cap": "very long"}],
            [("very long", "abc.mp4")],
        ),
    ],
)
def test_one_text_one_video(tmp_path, name, file, content, expected):
    rows, names, made = derive(tmp_path, name, write(tmp_path / file, content))
    assert [(item["text"], *own) for item, own, _ in rows] == expected and names == [
        video for _, video in expected
    ]
    assert (
        made["queries"] == len(expected)
        and made["published"]["queries"] == uvrb.DATASETS[name].queries
    )
    assert (
        made["source"][file]["sha256"] == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    )
    assert sum(made["keys"]["video"].values()) == (len(content) if isinstance(content, list) else 2)


@pytest.fixture(scope="module")
def dream_rows():
    """DREAM-1K's structure: 1,000 videos, 6,298 events; 6,214 texts are in one video, 32 in two, 4 in three, 1 in five, and three
    stand twice in the same video."""
    events, video = [[] for _ in range(1000)], itertools.cycle(range(1000))
    copies = [5] + [3] * 4 + [2] * 32 + [1] * 6214
    for number, count in enumerate(copies):
        for _ in range(count):
            events[next(video)].append(f"Event {number} happens.")
    for own in events[:3]:
        own.append(own[-1])
    assert sum(map(len, events)) == 6298
    return [
        {
            "idx": f"DREAM-1K_{i}",
            "video_file": f"video_{i}.mp4",
            "source": "youtube",
            "events": own,
            "n_events": len(own),
        }
        for i, own in enumerate(events)
    ]


@pytest.mark.parametrize("form", ["list", "json", "python", "jsonl"])
def test_dream_1k_gives_the_published_6251_queries(tmp_path, dream_rows, form):
    as_text = {"json": json.dumps, "python": repr}.get(form, list)
    rows = [{**row, "events": as_text(row["events"])} for row in dream_rows]
    if form == "jsonl":
        rows = [
            {
                "vid": f"video_{i}",
                "dataset": "DREAM/youtube",
                "idx": i,
                "extra_info": {"events": row["events"]},
                "messages": [{}],
                "video_file": "<placeholder>",
            }
            for i, row in enumerate(rows)
        ]
    source = write(tmp_path / ("DREAM-1k.jsonl" if form == "jsonl" else "metadata.json"), rows)
    queries, names, made = derive(tmp_path, "DREAM-E", source)
    counts = [len(own) for _, own, _ in queries]
    assert len(queries) == 6251 == uvrb.DATASETS["DREAM-E"].queries and len(names) == 1000
    assert sum(2 <= n <= 5 for n in counts) == 37 and made["queries_by_positives"] == {
        "1": 6214,
        "2": 32,
        "3": 4,
        "5": 1,
    }
    assert round(ceiling("R@1", counts), 4) == 0.9969
    assert made["counts"] == {
        "read": 6298,
        "left_out": 0,
        "corpus_only": 0,
        "empty": 0,
        "equal": 47,
    }


def test_equal_texts_are_merged_kept_apart_or_left_to_the_first(tmp_path):
    members = {
        f"{i}.json": json.dumps({"keywords": words, "human_caption": "no"}).encode()
        for i, words in enumerate((["colorful", "paper"], "night, city", ["colorful", "paper"], []))
    }
    for part in range(2):
        write_tar(
            tmp_path / "test" / f"{part}.tar",
            dict(list(members.items())[2 * part : 2 * part + 2]) | {"x.mp4": b"no"},
        )
    rows, names, made = derive(tmp_path, "PEV-K", tmp_path / "test")
    merged = [
        ({"text": "colorful, paper"}, ["0.mp4", "2.mp4"], None),
        ({"text": "night, city"}, ["1.mp4"], None),
    ]
    assert rows == merged and names == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert made["counts"]["empty"] == made["counts"]["equal"] == 1
    assert "sha256" not in made["source"]["0.tar"] and made["duplicates"] == "merge"
    first = derive(tmp_path, "PEV-K", tmp_path / "test", "--duplicates", "first")[0]
    assert [own for _, own, _ in first] == [["0.mp4"], ["1.mp4"]]
    kept, _, made = derive(tmp_path, "PEV-K", tmp_path / "test", "--duplicates", "keep")
    assert [own for _, own, _ in kept] == [["0.mp4"], ["1.mp4"], ["2.mp4"]] and made["flags"][
        "duplicates"
    ] == "keep"


def test_only_queries_and_sample_choose_what_the_paper_leaves_open(tmp_path):
    source = write(
        tmp_path / "all_video.jsonl", [{"vid": f"v.{i}", "cap": f"text {i}"} for i in range(9)]
    )
    (tmp_path / "names.txt").write_text("v.3\nv.5.mp4\n")
    rows, names, _ = derive(tmp_path, "LoVR-V", source, "--only", tmp_path / "names.txt")
    assert names == ["v.3.mp4", "v.5.mp4"] and len(rows) == 2
    rows, names, made = derive(tmp_path, "LoVR-V", source, "--queries", tmp_path / "names.txt")
    assert (
        [own for _, own, _ in rows] == [["v.3.mp4"], ["v.5.mp4"]]
        and len(names) == 9
        and made["counts"]["corpus_only"] == 7
    )
    drawn = [
        derive(tmp_path, "LoVR-V", source, "--sample", 4, "--seed", seed)[0] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 4


def test_a_frame_per_video_is_drawn_under_the_seed_and_lies_inside(tmp_path):
    for name, frames in (("video1", 8), ("video2", 16)):
        write_video(tmp_path / f"{name}.mp4", moving_square(frames))
    source = write(
        tmp_path / "JSFUSION.csv",
        "key,vid_key,video_id,sentence\nret0,msr1,video1,a\nret1,msr2,video2,b\n",
    )
    drawn = {}
    for flags in (("--seed", 0), ("--seed", 1), ("--choose", "middle")):
        rows, names, made = derive(tmp_path, "MSRVTT-I2V", source, "--media", tmp_path, *flags)
        assert (
            [item["image"]["video"] for item, _, _ in rows] == names == ["video1.mp4", "video2.mp4"]
        )
        drawn[flags] = [item["image"]["time"] for item, _, _ in rows]
        assert 0 <= drawn[flags][0] <= 1 and 0 <= drawn[flags][1] <= 2 and made["flags"]["media"]
    assert drawn["--choose", "middle"] == [0.5, 1.0] and drawn["--seed", 0] != drawn["--seed", 1]
    bench = uvrb.read(tmp_path / "out", "MSRVTT-I2V", [tmp_path])  # with --root the media are found
    assert not bench.missing and bench.queries[0]["item"]["image"]["video"] == str(
        (tmp_path / "video1.mp4").resolve()
    )


@pytest.mark.parametrize("form", ["path", "columns"])
def test_one_clip_per_long_video(tmp_path, form):
    paths = [
        f"long_video_clip/{vid}/{vid}-Scene-{n:03d}.mp4"
        for vid in ("ab", "cd")
        for n in range(1, 6)
    ]
    rows = [
        {"path": path, "cap": "x"}
        if form == "path"
        else {"clip_path": path, "video_id": path[16:18]}
        for path in paths
    ]
    source = write(tmp_path / "all_clip.jsonl", rows)
    ways = ("--choose", "first"), ("--seed", 1), ("--seed", 2)
    drawn = {flags: derive(tmp_path, "LoVR-C2V", source, *flags)[0] for flags in ways}
    assert drawn["--choose", "first"] == [
        ({"video": paths[0]}, ["ab.mp4"], None),
        ({"video": paths[5]}, ["cd.mp4"], None),
    ]
    assert drawn["--seed", 1] != drawn["--seed", 2]
    assert all(
        Path(item["video"]).parent.name + ".mp4" == own[0]
        for rows in drawn.values()
        for item, own, _ in rows
    )


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_momentseeker_keeps_each_query_s_own_candidates(tmp_path, form):
    clips = [f"movie/{i}.mp4" for i in range(12)]
    if form == "json":
        for kind, image, video in (
            ("ti2v", "img/q.jpg", ""),
            ("tv2v", "", "clips/q.mp4"),
            ("t2v", "", ""),
        ):
            write(
                tmp_path / "json" / f"movie_{kind}.json",
                [
                    {
                        "qry_text": "what next?",
                        "qry_img_path": image,
                        "qry_video_path": video,
                        "gt_indices": [1, 4],
                        "candidate_video_list": [
                            {"output_path": clip, "start": 0} for clip in clips
                        ],
                    }
                ],
            )
        source = tmp_path / "json"
    else:
        source = write(
            tmp_path / "test-00000-of-00001.parquet",
            [
                {
                    "query": "what next?",
                    "input_frames": media,
                    "positive_frames": [{"output_path": clips[i]} for i in (1, 4)],
                    "negative_frames": [
                        {"output_path": clip} for i, clip in enumerate(clips) if i not in (1, 4)
                    ],
                }
                for media in ("img/q.jpg", "clips/q.mp4", "")
            ],
        )
    for name, media in (("MS-TI", {"image": "img/q.jpg"}), ("MS-TV", {"video": "clips/q.mp4"})):
        item = {"text": "what next?", **media}
        rows, names, _ = derive(tmp_path, name, source)
        assert [(row[0], row[1], sorted(row[2])) for row in rows] == [
            (item, [clips[1], clips[4]], sorted(clips))
        ]
        ((_, own, pool),) = derive(tmp_path, name, source, "--pool", 10)[0]
        assert (
            own == [clips[1], clips[4]] and len(pool) == 10 and set(own) < set(pool) <= set(clips)
        )


@pytest.mark.parametrize(
    "name, content, flags, message",
    [
        (
            "CMRB",
            [{"path": "a.mp4", "labels": ["pan"]}],
            [],
            "x.json:1: none of the keys caption, Caption, text, description; keys found: path, labels",
        ),
        (
            "LoVR-TH",
            [{"path": "a.mp4", "theme": "t"}],
            ["--text-key", "topic"],
            "none of the keys topic; keys found: path, theme",
        ),
        (
            "DREAM-E",
            [{"video_file": "a.mp4", "events": "1, 2"}],
            [],
            "x.json:1: events must be a list of strings",
        ),
        ("MSRVTT-I2V", [{"video": "a.mp4"}], [], "--media names the folder"),
        ("CRB-G", [{"video": "a.mp4", "caption": ""}], [], "no queries"),
        ("CRB-G", [], [], "no queries"),
    ],
)
def test_what_cannot_be_derived_says_why_and_writes_nothing(
    tmp_path, name, content, flags, message
):
    source = write(tmp_path / "x.json", content)
    with pytest.raises(SystemExit, match=message):
        command.main([name, str(source), str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_guessed_key_can_be_named(tmp_path):
    source = write(tmp_path / "x.jsonl", [{"file": "a.mp4", "motion": "It pans.", "caption": "no"}])
    rows, names, made = derive(
        tmp_path, "CMRB", source, "--text-key", "motion", "--video-key", "file"
    )
    assert rows == [({"text": "It pans."}, ["a.mp4"], None)] and made["keys"] == {
        "text": {"motion": 1},
        "video": {"file": 1},
    }
