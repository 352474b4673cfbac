"""Build UVRB's datasets from upstream annotation files (paper, Table 4 and A.2).

    python extras/derive.py DREAM-E DREAM-1K/json/metadata.json OUT
    # -> OUT/DREAM-E/jsonl/{queries,corpus,instances}.jsonl

Rows name videos as upstream does: put or link them at OUT/<NAME>/videos, or name their folder with
--root when checking and scoring. The released files, where they can be had, are the benchmark. Each
choice that the paper leaves open is a flag here; every choice, the keys that were read and all
counts are in OUT/<NAME>/provenance.json.
"""

import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, for a script

import uvrb
from extras.convert import SUFFIXES, key_in, pick, read_rows
from support.files import visible_files, write_json, write_jsonl
from support.flags import flag, parse_flags
from support.media import load_video

# The file formats of UVRB's upstream videos, DiDeMo's odd ones included.
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


class Rows:
    """Upstream's rows with their keys resolved.

    used: {"text" or "video": how often each key was read}, for provenance.json.
    """

    def __init__(self, flags):
        self.flags = flags
        # A key that the user names replaces the known ones.
        upstream = UPSTREAM[flags.name]
        self.keys = {
            "text": [flags.text_key] if flags.text_key else upstream.text_keys,
            "video": [flags.video_key] if flags.video_key else upstream.video_keys,
        }
        self.used = {"text": Counter(), "video": Counter()}

    def __iter__(self):
        return read_rows(self.flags.source)

    def get(self, kind, where, row):
        """Return the row's "text" or "video"; ValueError with the keys found if it has none."""
        key = key_in(where, row, *self.keys[kind])
        self.used[kind][key] += 1
        return row[key]

    def video(self, where, row):
        """Return the row's video as a path."""
        return file_name(str(self.get("video", where, row)))


def file_name(video):
    """Return a video's file name; one given by its id alone gets .mp4."""
    return video if Path(video).suffix.lower() in VIDEO_SUFFIXES else video + ".mp4"


# How queries are made. Each function takes Rows and yields (query item, positive videos, negative
# videos). An empty item is no query, but its videos are in the corpus.


def one_text_per_video(rows):
    """One text per video; a list of keywords becomes one text."""
    for where, row in rows:
        text = rows.get("text", where, row)
        if isinstance(text, list):
            text = ", ".join(text)
        yield {"text": text}, [rows.video(where, row)], []


def paragraph_to_video(rows):
    """All sentences of a video, joined in file order."""
    sentences = {}  # {video: its sentences}
    for where, row in rows:
        video = rows.video(where, row)
        text = rows.get("text", where, row).strip()
        sentences.setdefault(video, []).append(text)
    for video, texts in sentences.items():
        yield {"text": " ".join(texts)}, [video], []


def event_to_video(rows):
    """Every event of a video is a query; events are a list, or a string that holds one."""
    for where, row in rows:
        row = row | (row.get("extra_info") or {})  # DREAM-1k.jsonl has its events in there
        name = row.get("video_file")
        if not name or name.startswith("<"):  # a placeholder, also there
            row.pop("video_file", None)
        video = rows.video(where, row)

        # Releases differ: a list, JSON in a string, or a Python list in a string.
        events = rows.get("text", where, row)
        if isinstance(events, str):
            with contextlib.suppress(ValueError, SyntaxError):
                if events.startswith('["'):
                    events = json.loads(events)
                else:
                    events = ast.literal_eval(events)
        if not isinstance(events, list) or not all(isinstance(event, str) for event in events):
            raise ValueError(
                f"{where}: events must be a list of strings, or a string that holds one, "
                f"got {events!r}"
            )
        for event in events or [""]:  # a video without events stays in the corpus
            yield {"text": event}, [video], []


def frame_to_video(rows):
    """One frame of a video is the query."""
    flags = rows.flags
    for where, row in rows:
        video = rows.video(where, row)
        try:
            _, seconds = load_video(os.path.join(flags.media, video), 2)
        except FileNotFoundError as error:
            raise ValueError(
                f"{where}: {error}; --media names the folder of the videos, "
                "whose lengths are needed"
            ) from error

        if flags.choose == "random":  # the draw for a video does not depend on the others
            fraction = random.Random(f"{flags.seed} {video}").random()
        else:
            fraction = {"first": 0, "middle": 0.5}[flags.choose]
        time = round(fraction * seconds, 6)
        yield {"image": {"video": video, "time": time}}, [video], []


def clip_to_video(rows):
    """One clip of a long video is the query.

    The row names the long video; if not, the clip's folder has its name.
    """
    flags = rows.flags
    clips = {}  # {long video: its clips}
    for where, row in rows:
        clip = rows.video(where, row)
        long_video = row.get("video_path") or row.get("video_id") or row.get("vid")
        long_video = str(long_video or Path(clip).parent.name)
        if not long_video:
            raise ValueError(
                f"{where}: {clip} lies in no folder named after its video; "
                f"keys found: {', '.join(row)}"
            )
        clips.setdefault(file_name(long_video), []).append(clip)

    for video, own in clips.items():
        if flags.choose == "random":
            chosen = random.Random(f"{flags.seed} {video}").randrange(len(own))
        else:
            chosen = {"first": 0, "middle": len(own) // 2}[flags.choose]
        yield {"video": sorted(own)[chosen]}, [video], []


def composed_to_pool(rows):
    """A text with an image or a clip, ranked over the query's own candidates (MomentSeeker)."""
    flags = rows.flags
    kind = {"MS-TI": "image", "MS-TV": "video"}[flags.name]
    for where, row in rows:
        if "candidate_video_list" in row:  # MomentSeeker's own json
            media = {"image": row.get("qry_img_path"), "video": row.get("qry_video_path")}
            paths = [candidate["output_path"] for candidate in row["candidate_video_list"]]
            positives = [paths[i] for i in pick(where, row, "gt_indices")]
            negatives = [path for path in paths if path not in positives]
        else:  # MMEB-V2's parquet
            path = pick(where, row, "input_frames") or ""
            is_video = Path(path).suffix.lower() in VIDEO_SUFFIXES
            media = {"video" if is_video else "image": path}
            positives = [clip["output_path"] for clip in pick(where, row, "positive_frames")]
            negatives = [clip["output_path"] for clip in pick(where, row, "negative_frames")]
        if not media.get(kind):  # the other kinds of query share the files
            continue

        # Positives are never cut.
        if flags.pool and len(positives) + len(negatives) > flags.pool:
            draw = random.Random(f"{flags.seed} {where}")
            negatives = draw.sample(negatives, max(0, flags.pool - len(positives)))
        yield {"text": rows.get("text", where, row), kind: media[kind]}, positives, negatives


class Upstream(NamedTuple):
    """The known facts about a dataset's upstream files."""

    text_keys: tuple  # of the query's text, most likely first; --text-key replaces them
    video_keys: tuple  # of the video, likewise; --video-key
    queries: Callable = one_text_per_video
    merge: bool = False  # equal texts are one query with all their videos
    left_open: str = "nothing known"  # by the paper


MOMENTSEEKER = Upstream(  # its json folder, or MMEB-V2's parquet
    ("qry_text", "query"),
    (),
    queries=composed_to_pool,
    left_open="the candidates: here each query's own list; --pool cuts it",
)
UPSTREAM = {
    "MSRVTT": Upstream(  # JSFusion's csv, or msrvtt_test_1k.json
        ("sentence", "caption"), ("video", "video_id")
    ),
    "MSRVTT-I2V": Upstream(
        (),
        ("video", "video_id"),
        queries=frame_to_video,
        left_open="which frame of a video is its query",
    ),
    "DiDeMo": Upstream(  # test_data.json with a row per sentence, or didemo_test.json
        ("description", "caption"),
        ("video",),
        queries=paragraph_to_video,
        left_open="which 1,004 of the 1,037 test videos (--only)",
    ),
    # CaReBench's metadata.json
    "CRB-G": Upstream(("caption",), ("video",)),
    "CRB-S": Upstream(("spatial_caption",), ("video",)),
    "CRB-T": Upstream(("temporal_caption",), ("video",)),
    # VDC_1k.jsonl
    "VDC-O": Upstream(("main_object_caption",), ("video_name",)),
    "VDC-D": Upstream(
        ("detailed_caption",),
        ("video_name",),
        left_open="which 27 of the 1,027 captions are no queries (--queries, --sample)",
    ),
    "CMRB": Upstream(  # CameraBench's test.jsonl
        ("caption", "Caption", "text", "description"),
        ("path", "video"),
        merge=True,
        left_open="the caption's key, and whether equal captions are one query "
        "(728 queries for 1,071 videos suggest it)",
    ),
    "DREAM-E": Upstream(  # DREAM-1K's metadata.json or DREAM-1k.jsonl
        ("events",),
        ("video_file", "vid"),
        queries=event_to_video,
        merge=True,
        left_open="nothing: exact-string merging gives the published 6,251",
    ),
    "LoVR-TH": Upstream(
        ("theme", "theme_caption", "clip_theme", "themes"),
        ("clip_path", "path", "clip_id"),
        left_open="the theme's key and which 8,854 clips",
    ),
    "LoVR-V": Upstream(  # all_video.jsonl or parquet
        ("cap", "video_caption", "caption"),
        ("video_path", "vid", "video_id"),
        left_open="which 100 captions are queries (--queries, --sample)",
    ),
    "LoVR-C2V": Upstream(  # all_clip.jsonl or parquet
        (),
        ("clip_path", "path"),
        queries=clip_to_video,
        left_open="which clip of a video is its query",
    ),
    "PEV-K": Upstream(  # a folder of PE-Video's test/*.tar
        ("keywords", "keyword"),
        ("__key__", "key", "video"),
        merge=True,
        left_open="whether equal keyword lists are one query, and how a list is written "
        "(here: joined by a comma and a space)",
    ),
    "MS-TI": MOMENTSEEKER,
    "MS-TV": MOMENTSEEKER,
}
MERGED = ", ".join(name for name, upstream in UPSTREAM.items() if upstream.merge)


@dataclasses.dataclass
class Flags:
    name: str = flag(..., "dataset", choices=list(UPSTREAM), positional=True)
    source: str = flag(..., "upstream's annotation file, or a folder of them", positional=True)
    out: str = flag(..., "benchmark folder to write into", positional=True)
    media: str = flag("", "MSRVTT-I2V: folder of the videos, to choose frames by their lengths")
    seed: int = flag(0, "random seed of --choose random, --sample and --pool")
    choose: str = flag(
        "random",
        "MSRVTT-I2V, LoVR-C2V: the frame or clip of a video that is its query",
        choices=["random", "middle", "first"],
    )
    duplicates: str = flag(
        "",
        "equal queries: one with the videos of all, one with the first's, or several; "
        f"empty: merge for {MERGED}, else keep",
        choices=["merge", "first", "keep"],
    )
    only: str = flag("", "file with a video name per line: others are left out altogether")
    queries: str = flag("", "file with a video name per line: others are corpus only")
    sample: int = flag(0, "draw this many queries, the corpus stays whole; 0: keep all")
    pool: int = flag(
        0, "MS-TI, MS-TV: candidates per query, positives included; 0: those of upstream"
    )
    text_key: str = flag("", "key of the query's text, if it is not among the known ones")
    video_key: str = flag("", "key of the video's name or path")


@dataclasses.dataclass
class Query:
    """One query; its videos are dicts as ordered sets."""

    item: dict
    positives: dict
    negatives: dict


@dataclasses.dataclass
class Dataset:
    """A dataset as read from upstream."""

    queries: list  # of Query
    corpus: dict  # videos, a dict as an ordered set
    counts: Counter  # of upstream's rows and their fates


def collect(rows, flags, duplicates):
    """Read all rows -> Dataset. duplicates: "merge", "first" or "keep" (see --duplicates)."""
    only = names_in(flags.only)
    asking = names_in(flags.queries)
    queries = {}
    corpus = {}
    counts = Counter(read=0, left_out=0, corpus_only=0, empty=0, equal=0)
    for item, positives, negatives in UPSTREAM[flags.name].queries(rows):
        counts["read"] += 1

        # A file of names decides whether a video is in the dataset, or among its queries.
        stems = {Path(video).stem for video in positives}
        if only and not stems & only:
            counts["left_out"] += 1
            continue
        corpus.update(dict.fromkeys([*positives, *negatives]))
        if asking and not stems & asking:
            counts["corpus_only"] += 1
            continue
        if not all(item.values()) or not positives:
            counts["empty"] += 1
            continue

        # Equal queries have equal keys, unless all are kept.
        key = counts["read"] if duplicates == "keep" else json.dumps(item, sort_keys=True)
        if key not in queries:
            queries[key] = Query(item, dict.fromkeys(positives), dict.fromkeys(negatives))
            continue

        counts["equal"] += 1
        if duplicates == "merge":
            queries[key].positives.update(dict.fromkeys(positives))
            queries[key].negatives.update(dict.fromkeys(negatives))
    return Dataset(list(queries.values()), corpus, counts)


def derive(flags):
    """Write one dataset and its provenance.json; returns what to print.

    Raises ValueError naming file, row and the keys found, or if no row makes a query.
    """
    upstream = UPSTREAM[flags.name]
    rows = Rows(flags)
    duplicates = flags.duplicates or ("merge" if upstream.merge else "keep")
    dataset = collect(rows, flags, duplicates)
    if not dataset.queries:
        raise ValueError(f"{flags.source}: no queries for {flags.name} ({dict(dataset.counts)})")

    # Drawn queries keep their order.
    kept = dataset.queries
    if flags.sample:
        n = min(flags.sample, len(kept))
        drawn = random.Random(flags.seed).sample(range(len(kept)), n)
        kept = [kept[i] for i in sorted(drawn)]

    files = make_files(flags.name, kept, dataset.corpus)
    folder = Path(flags.out) / flags.name
    (folder / "jsonl").mkdir(parents=True, exist_ok=True)
    for file, lines in files.items():
        write_jsonl(folder / "jsonl" / f"{file}.jsonl", lines)

    published = uvrb.DATASETS[flags.name]
    by_positives = Counter(len(instance["pos"]) for instance in files["instances"])
    by_positives = dict(sorted(by_positives.items()))
    provenance = {
        "dataset": flags.name,
        "source": fingerprints(flags.source),
        "flags": vars(flags),
        "duplicates": duplicates,
        "keys": rows.used,
        "counts": dataset.counts,
        "queries": len(files["queries"]),
        "corpus": len(files["corpus"]),
        "queries_by_positives": by_positives,
        "published": {"queries": published.queries, "corpus": published.corpus},
        "left_open_by_the_paper": upstream.left_open,
    }
    write_json(folder / "provenance.json", provenance)
    return (
        f"{folder}: {len(files['queries'])} queries, {len(files['corpus'])} videos "
        f"(Table 4: {published.queries}, {published.corpus}); "
        f"queries by number of positives {by_positives}; "
        f"left open by the paper: {upstream.left_open}"
    )


def make_files(name, queries, corpus):
    """Number queries and videos -> the rows of {"queries", "corpus", "instances"}."""
    corpus_ids = {}
    for video in corpus:
        corpus_ids[video] = f"{name}_corpus_{len(corpus_ids)}"

    files = {"queries": [], "corpus": [], "instances": []}
    for i, query in enumerate(queries):
        query_id = f"{name}_query_{i}"
        files["queries"].append({"id": query_id, **query.item})
        instance = {"qid": query_id, "pos": [corpus_ids[video] for video in query.positives]}
        # Merged queries may have a video as positive of one and negative of another.
        negatives = [video for video in query.negatives if video not in query.positives]
        if negatives:
            instance["neg"] = [corpus_ids[video] for video in negatives]
        files["instances"].append(instance)
    for video, video_id in corpus_ids.items():
        files["corpus"].append({"id": video_id, "video": video})
    return files


def names_in(path):
    """Return the stems of the video names in a file, one a line; an empty set for no file."""
    if not path:
        return set()
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {Path(file_name(name)).stem for name in names if name}


def fingerprints(source):
    """Return {file: {"bytes", "sha256"}} of a source; archives of videos by their size alone."""
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = [file for file in visible_files(path) if file.suffix in SUFFIXES]

    out = {}
    for file in files:
        out[file.name] = {"bytes": file.stat().st_size}
        if file.suffix != ".tar":
            out[file.name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return out


def main(argv=None):
    """Derive a dataset and print its counts; the program ends with the reason if it cannot."""
    flags = parse_flags(Flags, argv, __doc__)
    try:
        print(derive(flags))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
