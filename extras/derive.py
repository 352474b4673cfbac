"""Build UVRB's datasets from upstream annotation files, as far as their formats are known (paper, Table 4 and A.2).

    python uvrb.py derive DREAM-E DREAM-1K/json/metadata.json OUT          # -> OUT/DREAM-E/jsonl/{queries,corpus,instances}.jsonl

Rows name videos as upstream does: put or link them at OUT/<NAME>/videos, or name their folder with --root when checking and
scoring. The released files, where they can be had, are the benchmark; what the paper leaves open is a flag here, and every
choice, the keys that were read and all counts are in OUT/<NAME>/provenance.json.
"""

import ast
import contextlib
import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path

import data
from extras.convert import SUFFIXES, key_in, pick, read_rows
from support.files import write_jsonl

VIDEO_SUFFIXES = {
    ".avi",
    ".flv",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".webm",
    ".wmv",
    ".3gp",
}

# Keys of the query's text and of the video, most likely first; --text-key and --video-key replace them.
KEYS = {
    "MSRVTT": (
        ("sentence", "caption"),
        ("video", "video_id"),
    ),  # JSFusion csv, or msrvtt_test_1k.json
    "MSRVTT-I2V": ((), ("video", "video_id")),
    "DiDeMo": (
        ("description", "caption"),
        ("video",),
    ),  # test_data.json, one row per sentence, or didemo_test.json
    "CRB-G": (("caption",), ("video",)),  # CaReBench's metadata.json
    "CRB-S": (("spatial_caption",), ("video",)),
    "CRB-T": (("temporal_caption",), ("video",)),
    "VDC-O": (("main_object_caption",), ("video_name",)),  # VDC_1k.jsonl
    "VDC-D": (("detailed_caption",), ("video_name",)),
    "CMRB": (
        ("caption", "Caption", "text", "description"),
        ("path", "video"),
    ),  # CameraBench's test.jsonl; text key not known
    "DREAM-E": (("events",), ("video_file", "vid")),  # DREAM-1K's metadata.json or DREAM-1k.jsonl
    "LoVR-TH": (
        ("theme", "theme_caption", "clip_theme", "themes"),
        ("clip_path", "path", "clip_id"),
    ),  # theme key not known
    "LoVR-V": (
        ("cap", "video_caption", "caption"),
        ("video_path", "vid", "video_id"),
    ),  # all_video.jsonl or parquet
    "LoVR-C2V": ((), ("clip_path", "path")),  # all_clip.jsonl or parquet
    "PEV-K": (
        ("keywords", "keyword"),
        ("__key__", "key", "video"),
    ),  # a folder of PE-Video's test/*.tar
    "MS-TI": (("qry_text", "query"), ()),  # MomentSeeker's json folder, or MMEB-V2's parquet
    "MS-TV": (("qry_text", "query"), ()),
}
MERGED = (
    "CMRB",
    "DREAM-E",
    "PEV-K",
)  # equal texts are one query with all their videos; this gives DREAM-E's 6,251 queries
OPEN = {
    "MSRVTT-I2V": "which frame of a video is its query",
    "DiDeMo": "which 1,004 of the 1,037 test videos (--only)",
    "VDC-D": "which 27 of the 1,027 captions are no queries (--queries, --sample)",
    "CMRB": "the caption's key, and whether equal captions are one query (728 queries for 1,071 videos suggest it)",
    "DREAM-E": "nothing: exact-string merging gives the published 6,251",
    "LoVR-TH": "the theme's key and which 8,854 clips",
    "LoVR-V": "which 100 captions are queries (--queries, --sample)",
    "LoVR-C2V": "which clip of a video is its query",
    "PEV-K": "whether equal keyword lists are one query, and how a list is written (here: joined by a comma and a space)",
    "MS-TI": "the candidates: here each query's own list; --pool cuts it",
    "MS-TV": "the candidates: here each query's own list; --pool cuts it",
}


def add_flags(parser, names):
    parser.add_argument(
        "name",
        choices=[name for name in names if name in KEYS],
        metavar="NAME",
        help=", ".join(KEYS),
    )
    parser.add_argument("source", help="upstream's annotation file, or a folder of them")
    parser.add_argument("out", help="benchmark folder to write into")
    parser.add_argument(
        "--media",
        default="",
        help="MSRVTT-I2V: folder of the videos, whose lengths are needed to choose frames",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of --choose random, --sample and --pool"
    )
    parser.add_argument(
        "--choose",
        choices=["random", "middle", "first"],
        default="random",
        help="MSRVTT-I2V, LoVR-C2V: the frame or clip of a video that is its query",
    )
    parser.add_argument(
        "--duplicates",
        choices=["merge", "first", "keep"],
        help="equal queries: one with the videos of all, one "
        f"with the first's, or several (default: merge for {', '.join(MERGED)}, else keep)",
    )
    parser.add_argument(
        "--only", default="", help="file with a video name per line: others are left out altogether"
    )
    parser.add_argument(
        "--queries", default="", help="file with a video name per line: others are corpus only"
    )
    parser.add_argument(
        "--sample", type=int, help="keep so many queries, drawn at random; the corpus stays whole"
    )
    parser.add_argument(
        "--pool",
        type=int,
        help="MS-TI, MS-TV: candidates per query, positives included (default: upstream's)",
    )
    parser.add_argument(
        "--text-key", help="key of the query's text, where it is another than those known"
    )
    parser.add_argument("--video-key", help="key of the video's name or path")


def file_name(video):
    return video if Path(video).suffix.lower() in VIDEO_SUFFIXES else video + ".mp4"


class Rows:
    """Upstream's rows with their keys resolved; remembers which keys were used, for provenance.json."""

    def __init__(self, flags):
        self.flags, self.used = flags, {"text": Counter(), "video": Counter()}
        given = {"text": flags.text_key, "video": flags.video_key}
        self.keys = {
            kind: [given[kind]] if given[kind] else known
            for kind, known in zip(given, KEYS[flags.name], strict=True)
        }

    def __iter__(self):
        return iter(read_rows(self.flags.source))

    def get(self, kind, where, row):
        key = key_in(where, row, *self.keys[kind])
        self.used[kind][key] += 1
        return row[key]

    def video(self, where, row):
        """The row's video as a path; ids that are no file names get .mp4."""
        return file_name(str(self.get("video", where, row)))


# Each derivation yields (query item, positive videos, negative videos); a query without content leaves its videos in the corpus.


def captions(rows):
    """One text per video; a list of keywords becomes one text."""
    for where, row in rows:
        text = rows.get("text", where, row)
        yield (
            {"text": ", ".join(text) if isinstance(text, list) else text},
            [rows.video(where, row)],
            [],
        )


def didemo(rows):
    """All sentences of a video, joined in file order: paragraph to video."""
    sentences = {}
    for where, row in rows:
        sentences.setdefault(rows.video(where, row), []).append(
            rows.get("text", where, row).strip()
        )
    yield from (({"text": " ".join(texts)}, [video], []) for video, texts in sentences.items())


def dream(rows):
    """Every event of a video is a query; events are a list, or a string that holds one."""
    for where, row in rows:
        row = row | (row.get("extra_info") or {})  # DREAM-1k.jsonl
        if not row.get("video_file") or row["video_file"].startswith("<"):
            row.pop("video_file", None)  # a placeholder there
        video, events = rows.video(where, row), rows.get("text", where, row)
        if isinstance(events, str):
            with contextlib.suppress(ValueError, SyntaxError):
                events = json.loads(events) if events.startswith('["') else ast.literal_eval(events)
        if not isinstance(events, list) or not all(isinstance(event, str) for event in events):
            raise ValueError(
                f"{where}: events must be a list of strings, or a string that holds one, got {events!r}"
            )
        yield from (({"text": event}, [video], []) for event in events or [""])


def frame_to_video(rows):
    """One frame of a video is the query."""
    flags = rows.flags
    for where, row in rows:
        video = rows.video(where, row)
        try:
            seconds = data.load_video(os.path.join(flags.media, video), 2)[1]
        except FileNotFoundError as error:
            raise ValueError(
                f"{where}: {error}; --media names the folder of the videos, whose lengths are needed"
            ) from error
        share = {
            "first": 0,
            "middle": 0.5,
            "random": random.Random(f"{flags.seed} {video}").random(),
        }[flags.choose]
        yield {"image": {"video": video, "time": round(share * seconds, 6)}}, [video], []


def clip_to_video(rows):
    """One clip of a long video is the query; the long video is the clip's folder, or given."""
    clips = {}
    for where, row in rows:
        clip = rows.video(where, row)
        long = str(
            row.get("video_path") or row.get("video_id") or row.get("vid") or Path(clip).parent.name
        )
        if not long:
            raise ValueError(
                f"{where}: {clip} lies in no folder named after its video; keys found: {', '.join(row)}"
            )
        clips.setdefault(file_name(long), []).append(clip)
    for video, own in clips.items():
        at = {
            "first": 0,
            "middle": len(own) // 2,
            "random": random.Random(f"{rows.flags.seed} {video}").randrange(len(own)),
        }
        yield {"video": sorted(own)[at[rows.flags.choose]]}, [video], []


def momentseeker(rows):
    """A text with an image or a clip, ranked over the query's own candidates."""
    kind, pool = {"MS-TI": "image", "MS-TV": "video"}[rows.flags.name], rows.flags.pool
    for where, row in rows:
        if "candidate_video_list" in row:  # MomentSeeker's own json
            media = {"image": row.get("qry_img_path"), "video": row.get("qry_video_path")}
            paths = [c["output_path"] for c in row["candidate_video_list"]]
            positives = [paths[i] for i in pick(where, row, "gt_indices")]
            negatives = [path for path in paths if path not in positives]
        else:  # MMEB-V2's parquet
            given = pick(where, row, "input_frames") or ""
            media = {"video" if Path(given).suffix.lower() in VIDEO_SUFFIXES else "image": given}
            positives = [c["output_path"] for c in pick(where, row, "positive_frames")]
            negatives = [c["output_path"] for c in pick(where, row, "negative_frames")]
        if not media.get(kind):
            continue  # the other kinds of query share the files
        if pool is not None and len(positives) + len(negatives) > pool:
            negatives = random.Random(f"{rows.flags.seed} {where}").sample(
                negatives, max(0, pool - len(positives))
            )
        yield {"text": rows.get("text", where, row), kind: media[kind]}, positives, negatives


RULES = {
    "DiDeMo": didemo,
    "DREAM-E": dream,
    "MSRVTT-I2V": frame_to_video,
    "LoVR-C2V": clip_to_video,
    "MS-TI": momentseeker,
    "MS-TV": momentseeker,
}


def derive(flags, published):
    """Write one dataset and its provenance.json; returns what to print. published: its (queries, corpus) in Table 4.

    Raises ValueError naming file, row and the keys found, or what the result would lack.
    """
    rows = Rows(flags)
    only, asking = names_in(flags.only), names_in(flags.queries)
    duplicates = flags.duplicates or ("merge" if flags.name in MERGED else "keep")
    queries, corpus, counts = {}, {}, Counter(read=0, left_out=0, corpus_only=0, empty=0, equal=0)
    for item, positives, negatives in RULES.get(flags.name, captions)(rows):
        counts["read"] += 1
        stems = {Path(video).stem for video in positives}  # of file names
        if only and not stems & only:
            counts["left_out"] += 1
            continue
        corpus.update(dict.fromkeys([*positives, *negatives]))
        if asking and not stems & asking:
            counts["corpus_only"] += 1
        elif not all(item.values()) or not positives:
            counts["empty"] += 1
        else:
            name = json.dumps(item, sort_keys=True) if duplicates != "keep" else counts["read"]
            counts["equal"] += name in queries
            known = queries.setdefault(name, (item, {}, {}))
            if duplicates == "merge" or not known[1]:
                known[1].update(dict.fromkeys(positives))
                known[2].update(dict.fromkeys(negatives))
    if not queries:
        raise ValueError(f"{flags.source}: no queries for {flags.name} ({dict(counts)})")
    kept = list(queries.values())
    if flags.sample is not None:
        kept = [
            kept[i]
            for i in sorted(
                random.Random(flags.seed).sample(range(len(kept)), min(flags.sample, len(kept)))
            )
        ]
    ids = {video: f"{flags.name}_corpus_{j}" for j, video in enumerate(corpus)}
    instances = [
        {
            "qid": f"{flags.name}_query_{i}",
            "pos": [ids[p] for p in pos],
            "neg": [ids[n] for n in neg if n not in pos],
        }
        for i, (_, pos, neg) in enumerate(kept)
    ]
    positives = dict(sorted(Counter(len(row["pos"]) for row in instances).items()))
    folder, left_open = Path(flags.out) / flags.name, OPEN.get(flags.name, "nothing known")
    (folder / "jsonl").mkdir(parents=True, exist_ok=True)
    write_jsonl(
        folder / "jsonl" / "queries.jsonl",
        [{"id": f"{flags.name}_query_{i}", **q[0]} for i, q in enumerate(kept)],
    )
    write_jsonl(
        folder / "jsonl" / "corpus.jsonl", [{"id": id, "video": video} for video, id in ids.items()]
    )
    write_jsonl(
        folder / "jsonl" / "instances.jsonl",
        [{k: v for k, v in row.items() if v} for row in instances],
    )
    write_jsonl(
        folder / "provenance.json",
        [
            {
                "dataset": flags.name,
                "source": fingerprints(flags.source),
                "flags": vars(flags),
                "duplicates": duplicates,
                "keys": rows.used,
                "counts": counts,
                "queries": len(kept),
                "corpus": len(ids),
                "queries_by_positives": positives,
                "published": {"queries": published[0], "corpus": published[1]},
                "left_open_by_the_paper": left_open,
            }
        ],
        indent=1,
    )
    return (
        f"{folder}: {len(kept)} queries, {len(ids)} videos (Table 4: {published[0]}, {published[1]}); "
        f"queries by number of positives {positives}; left open by the paper: {left_open}"
    )


def names_in(path):
    """Stems of the video names in a file, one a line; empty for no file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    return {Path(file_name(line.strip())).stem for line in lines if line.strip()}


def fingerprints(source):
    """{file: bytes and SHA-256} of what was read; archives of videos by size alone."""
    path, out = Path(source), {}
    for file in (
        sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES) if path.is_dir() else [path]
    ):
        out[file.name] = {"bytes": file.stat().st_size}
        if file.suffix != ".tar":
            out[file.name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return out
