"""Build the shipped emoji data set from two npm packages, the same bytes on every run.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python benchmarks/build_emoji.py GOOGLE.tgz TWITTER.tgz [OUT_DIR]

Every emoji is drawn by two vendors. Of half of the emoji of each class one vendor's drawing (with its skin tones) is
held out for the test split; the other vendor's drawing of the same emoji may be in the training split.
"""

import base64
import hashlib
import io
import json
import random
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PIL

EMOJI = Path(__file__).parents[1] / "vitpatch" / "assets" / "emoji"
SEED = 0
CELL, PIXELS = 34, 32  # pixels: a cell of the sheet, and the drawing within its border of 1
TEST_TONES, TRAIN_TONES = 1, 2  # skin tones taken at most beside the default drawing, for each base and vendor

# sha512 of the tarball, in base64 as the registry states it: (folder of its images, our name of the vendor)
PACKAGES = {
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==": ("google", "noto"),
    "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==": ("twitter", "twemoji"),
}

# class: patterns of the subcategory in Unicode's emoji list
CLASSES = {
    "face": ("face-*",),
    "person": ("person*", "family"),
    "body": ("body-parts", "hand-*", "hands"),
    "nature": ("animal-*", "dishware", "drink", "food-*", "plant-*", "sky & weather"),
    "travel": ("place-*", "transport-air", "transport-ground", "transport-water"),
    "clock": ("time",),
    "flag": ("*flag",),
    "shape": ("geometric", "heart"),
    "sign": (
        "alphanum", "arrow", "av-symbol", "currency", "emotion", "gender", "keycap", "math", "other-symbol",
        "punctuation", "religion", "transport-sign", "warning", "zodiac",
    ),
}  # fmt: skip

# a drawing that shows something else than its subcategory says: class, patterns of the short name
MOVED = {
    "sign": (  # pictograms of people and sound
        "bust_in_silhouette", "busts_in_silhouette", "family*", "man-boy*", "man-girl*", "man-man-*", "man-woman-*",
        "musical_note", "musical_score", "mute", "no_bell", "notes", "speaking_head_in_silhouette", "woman-boy*",
        "woman-girl*", "woman-woman-*",
    ),
    "nature": ("earth_*",),
}  # fmt: skip

# reason: patterns of the short name; what a person could not put into its class by sight, or has already seen
EXCLUDED = {
    "no person, only a trace or an outline of one": ("fingerprint", "footprints", "people_hugging"),
    "not a face": ("hankey", "space_invader"),
    "a part or a trace of an animal": ("coral", "feather", "feet", "pig_nose", "shell", "spider_web", "wing"),
    "a moon or sun with a face, or a thing for the weather": (
        "*moon_with_face", "closed_umbrella", "snowman*", "sun_with_face", "thermometer", "umbrella*",
    ),
    "a thing, neither vehicle nor place": (
        "anchor", "barber", "bricks", "compass", "construction", "globe_with_meridians", "hotsprings", "japan",
        "octagonal_sign", "oil_drum", "ring_buoy", "rock", "roller_skate", "rotating_light", "seat", "traffic_light",
        "vertical_traffic_light", "wheel", "wood", "world_map",
    ),
    "no dial": ("hourglass*",),
    "an object, not a sign": ("cinema", "hole", "love_letter", "name_badge", "vibration_mode"),
    "the flag of another country": (
        "flag-bv", "flag-cp", "flag-dg", "flag-ea", "flag-hm", "flag-mf", "flag-sj", "flag-um",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One image of the data set: an emoji, or one of its skin tones, as one vendor draws it."""

    label: str
    base: str  # unified code of the emoji without skin tone
    vendor: str
    name: str
    toned: bool
    rgb: bytes  # (32, 32, 3) on white
    alpha: bytes  # (32, 32)


def package(path: Path) -> tuple[str, list[dict], PIL.Image]:
    """Vendor, emoji list and sheet of drawings of one tarball, after checking that it is the one expected."""
    content = path.read_bytes()
    integrity = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if integrity not in PACKAGES:
        raise SystemExit(f"{path}: sha512-{integrity} is neither emoji-datasource-google nor -twitter 16.0.0 as packed")
    folder, vendor = PACKAGES[integrity]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        emoji = json.load(tar.extractfile("package/emoji.json"))
        sheet = PIL.open(io.BytesIO(tar.extractfile(f"package/img/{folder}/sheets-clean/32.png").read()))
        return vendor, emoji, sheet.convert("RGBA")


def matching(name: str, table: Mapping[str, Sequence[str]]) -> str | None:
    """The first key of a table that has a pattern for the name."""
    return next((key for key, patterns in table.items() if any(fnmatch(name, pattern) for pattern in patterns)), None)


def label_of(entry: dict) -> str | None:
    """The class of an emoji, or None where it has none or is excluded."""
    if matching(entry["short_name"], EXCLUDED):
        return None
    return matching(entry["short_name"], MOVED) or matching(entry["subcategory"], CLASSES)


def drawings(path: Path) -> Iterator[Drawing]:
    """Every drawing of a package that has a class, skin tones after their base; cells left blank are passed over."""
    vendor, emoji, sheet = package(path)
    for entry in sorted(emoji, key=lambda entry: entry["sort_order"]):
        label = label_of(entry)
        for tone, variant in {"": entry, **entry.get("skin_variations", {})}.items() if label else ():
            left, top = variant["sheet_x"] * CELL + 1, variant["sheet_y"] * CELL + 1
            cell = sheet.crop((left, top, left + PIXELS, top + PIXELS))
            if cell.getchannel("A").getextrema()[1] == 0:
                continue
            white = PIL.new("RGBA", cell.size, "white")
            white.alpha_composite(cell)
            name = entry["short_name"] + (f" {tone}" if tone else "")
            pixels = white.convert("RGB").tobytes(), cell.getchannel("A").tobytes()
            yield Drawing(label, entry["unified"], vendor, name, bool(tone), *pixels)


def distinct(found: Iterable[Drawing]) -> list[Drawing]:
    """The drawings without those that equal an earlier one in every pixel."""
    return list({drawing.rgb: drawing for drawing in reversed(list(found))}.values())[::-1]


def chance(*key: str) -> random.Random:
    """A generator that depends on the seed and the key only, so that one class does not move another's choices."""
    return random.Random(":".join((str(SEED), *key)))


def chosen(group: Sequence[Drawing], tones: int) -> list[Drawing]:
    """The default drawing of one base and vendor with at most `tones` of its skin tones."""
    toned = [drawing for drawing in group if drawing.toned]
    picked = chance("tones", group[0].base, group[0].vendor).sample(toned, min(tones, len(toned)))
    return [drawing for drawing in group if not drawing.toned or drawing in picked]


def split(found: Sequence[Drawing]) -> tuple[list[Drawing], list[Drawing]]:
    """Training and test drawings: of half of the bases of each class one vendor's are in the test."""
    groups: dict[tuple[str, str], list[Drawing]] = defaultdict(list)
    bases: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # class, base: vendors
    for drawing in found:
        groups[drawing.base, drawing.vendor].append(drawing)
        if drawing.vendor not in bases[drawing.label][drawing.base]:
            bases[drawing.label][drawing.base].append(drawing.vendor)
    held = {
        (base, chance("vendor", base).choice(sorted(vendors[base])))
        for vendors in bases.values()
        for base in sorted(vendors, key=lambda base: chance("half", base).random())[: (len(vendors) + 1) // 2]
    }
    train = [drawing for key, group in groups.items() if key not in held for drawing in chosen(group, TRAIN_TONES)]
    test = [drawing for key, group in groups.items() if key in held for drawing in chosen(group, TEST_TONES)]
    return train, test


def rounds(found: Sequence[Drawing]) -> Iterator[Drawing]:
    """The drawings in rounds, each with one of every class that has some left, in random order."""
    left = {label: [drawing for drawing in found if drawing.label == label] for label in CLASSES}
    for label, queue in left.items():
        chance("queue", label).shuffle(queue)
    order = chance("rounds")
    while left := {label: queue for label, queue in left.items() if queue}:
        yield from (left[label].pop() for label in order.sample(list(left), len(left)))


def png(mode: str, pixels: bytes) -> dict:
    """A 32x32 image as a value of the `Image` feature."""
    buffer = io.BytesIO()
    PIL.frombytes(mode, (PIXELS, PIXELS), pixels).save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def write(found: Iterable[Drawing], path: Path) -> None:
    """Write the drawings as a parquet file of `datasets`, in their order."""
    names = ClassLabel(names=list(CLASSES))
    text = Value("string")
    features = Features(image=Image(), label=names, mask=Image(), name=text, vendor=text, base=text)
    rows = [
        {
            "image": png("RGB", drawing.rgb),
            "label": names.str2int(drawing.label),
            "mask": png("L", drawing.alpha),
            "name": drawing.name,
            "vendor": drawing.vendor,
            "base": drawing.base,
        }
        for drawing in found
    ]
    Dataset.from_list(rows, features=features).to_parquet(path)


def main(google: str, twitter: str, out: str = str(EMOJI)) -> None:
    """Build `train.parquet` and `test.parquet` in the folder `out` and print the drawings of each class and split."""
    train, test = split(distinct([*drawings(Path(google)), *drawings(Path(twitter))]))
    ordered = {"train": list(rounds(train)), "test": list(rounds(test))}
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, found in ordered.items():
        write(found, Path(out) / f"{name}.parquet")
    counts = {name: Counter(drawing.label for drawing in found) for name, found in ordered.items()}
    bases = {label: len({d.base for found in ordered.values() for d in found if d.label == label}) for label in CLASSES}
    for label in CLASSES:
        print(f"| {label} | {bases[label]} | {counts['train'][label]} | {counts['test'][label]} |")
    print(f"| all | {sum(bases.values())} | {len(train)} | {len(test)} |")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
