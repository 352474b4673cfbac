"""A flat dataclass is the command line: a flag per field, its help beside it.

@dataclasses.dataclass
class Flags:
    path: str = flag(..., "file of items", positional=True)
    lr: float = flag(2e-3, "peak learning rate")

flags = parse_flags(Flags)          # items.jsonl --lr 1e-3
"""

import argparse
import dataclasses
import sys
from pathlib import Path


def flag(default, help, *, choices=None, positional=False):
    """Declare a field of a dataclass of flags.

    default: any value, or a list of them; `...` means that the user must give one.
    """
    metadata = {"help": help, "choices": choices, "positional": positional}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_flags(cls, argv=None, doc=None, presets=None):
    """Fill the dataclass `cls` from the command line and return it.

    bool fields become --x and --no-x, list fields take several words. Unknown and abbreviated flags
    end the program with status 2.

    doc: description for --help, which shows the defaults
    presets: {name: {field: other default}}, chosen by --preset; `cls` then has a field `preset`
    """
    parser = argparse.ArgumentParser(
        prog=program_name(),
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    preset = presets.get(preset_name(cls, argv), {}) if presets else {}
    unknown = preset.keys() - {field.name for field in dataclasses.fields(cls)}
    assert not unknown, f"a preset names flags that do not exist: {unknown}"

    for field in dataclasses.fields(cls):
        default = preset.get(field.name, default_of(field))
        add_argument(parser, field, default)
    return cls(**vars(parser.parse_args(argv)))


def program_name():
    """Return how the running program is started, for --help: train.py, or python -m mini."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return f"python -m {script.parent.name}"
    return script.name


def preset_name(cls, argv):
    """Read --preset before all other flags, so that --help shows that preset's defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=cls.preset)
    known, _ = parser.parse_known_args(argv)
    return known.preset


def default_of(field):
    """Return a field's default, `...` if it has none."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ...


def add_argument(parser, field, default):
    """Add one field to an argparse parser."""
    metadata = field.metadata
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    help = metadata.get("help", "")
    if shown not in ("", ...):
        help += f" (default {shown})"
    options = {"help": help.replace("%", "%%")}

    is_list = getattr(field.type, "__origin__", None) is list
    if field.type is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif is_list:
        options["type"] = field.type.__args__[0]
    else:
        options["type"] = field.type
        options["choices"] = metadata.get("choices")

    if metadata.get("positional"):
        if is_list:
            options["nargs"] = "+" if default is ... else "*"
        elif default is not ...:
            options["nargs"] = "?"
        name = field.name
    else:
        if is_list:
            options["nargs"] = "+"
        options["required"] = default is ...
        name = "--" + field.name.replace("_", "-")

    if default is not ...:
        options["default"] = default
    parser.add_argument(name, **options)
