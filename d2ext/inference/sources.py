"""Where images come from: files, folders, patterns, lists, COCO files, tar files, addresses,
videos, webcams."""

import dataclasses
import glob
import itertools
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2

from d2ext.data.folder import IMAGES
from d2ext.data.json_files import read_json
from d2ext.data.remote import file_system, is_address
from d2ext.errors import UserError
from d2ext.inference.records import ImageRecord
from d2ext.inference.storage import open_binary, place_below

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_CAMERA = "webcam:"

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Source:
    """Images in order.

    Attributes:
        records: a list, or an iterator for what can be read once and in order only.
        total: their number; None: not known.
        categories: of a COCO file, `{"id", "name"}` each.
        frame_rate: of a video, in pictures per second; 0: none.
    """

    records: Iterable[ImageRecord]
    total: int | None
    categories: list[dict] = dataclasses.field(default_factory=list)
    frame_rate: float = 0.0


def is_stream(text: str) -> bool:
    """Whether a word names a video or a webcam."""
    return text.startswith(_CAMERA) or text.startswith("rtsp://") or _suffix(text) in VIDEOS


def open_source(inputs: Sequence[str], image_root: str | None = None) -> Source:
    """The images that words on a command line stand for, see `find_images`; or the frames of one
    video or webcam.

    Raises:
        UserError: something stands for no image, or a video is not alone.
    """
    streams = [text for text in inputs if is_stream(text)]
    if not streams:
        return find_images(inputs, image_root)
    if image_root is not None:
        raise UserError("--images is the folder of the images of a COCO file; --input has none")
    if len(inputs) > 1:
        raise UserError(f"--input {streams[0]}: a video or webcam has to be the only input")
    return _open_video(streams[0])


def find_images(inputs: Sequence[str], image_root: str | None = None) -> Source:
    """The images that words stand for, each once, in order, with ids from 1; those of a single COCO
    file keep theirs.

    A word is an image file, a folder, a pattern, a text file with one path or address per line, a
    COCO file, a tar file, or the address of a file, of a folder (with a slash at its end), of a
    pattern or of a tar file.

    Args:
        image_root: folder of the images of COCO files; default: what the file says as `d2ext
            split` writes it, else `images` beside it, else the folder that the file is in. It may
            be an address.

    Raises:
        UserError: something stands for no image, or is a video or webcam.
    """
    found: list[ImageRecord] = []
    categories: list[dict] = []
    files = [text for text in inputs if _suffix(text) == ".json"]
    if image_root is not None and not files:
        raise UserError("--images is the folder of the images of a COCO file; --input has none")
    for text in inputs:
        if is_stream(text):
            raise UserError(
                f"--input {text}: frames can be read in their order only; use d2ext predict, or "
                "write them to files first"
            )
        if text in files:
            records, categories = _coco_records(os.path.expanduser(text), image_root)
            if len(inputs) == 1:
                return Source(records, len(records), categories)
        else:
            records = _records_of(text)
        found += records
    unique = {(r.place, r.span): r for r in reversed(found)}
    kept = [r for r in found if unique[r.place, r.span] is r]
    numbered = [dataclasses.replace(r, image_id=i) for i, r in enumerate(kept, start=1)]
    return Source(numbered, len(numbered), categories if len(inputs) == 1 else [])


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """Paths of the images that files, folders and patterns stand for, each once, in order.

    Raises:
        UserError: something stands for no file.
    """
    paths: list[str] = []
    for text in inputs:
        text = os.path.expanduser(text)
        if os.path.isdir(text):
            names = sorted(os.listdir(text))
            found = [os.path.join(text, n) for n in names if _suffix(n) in SUFFIXES]
        elif os.path.isfile(text):
            found = [text]
        else:
            found = [p for p in sorted(glob.glob(text, recursive=True)) if os.path.isfile(p)]
        if not found:
            kind = "folder holds no images" if os.path.isdir(text) else "no such image"
            raise UserError(f"--input {text}: {kind}")
        paths += found
    return list(dict.fromkeys(paths))


def _suffix(text: str) -> str:
    return Path(text.partition("?")[0] if is_address(text) else text).suffix.lower()


def _records_of(text: str) -> list[ImageRecord]:
    """Records of a word that is no COCO file and no video."""
    paths = _addresses(text) if is_address(text) else expand_inputs([text])
    found = []
    for path in paths:
        if path.endswith(_PACKED):
            raise UserError(f"--input {path}: a packed tar file is read as a whole; unpack it once")
        if _suffix(path) == ".tar":
            found += _tar_records(path)
        elif _suffix(path) == ".txt":
            found += _listed(path)
        else:
            found.append(ImageRecord(0, path, path))
    return found


def _addresses(text: str) -> list[str]:
    if not text.endswith("/") and "*" not in text:
        return [text]
    system, path = file_system(text)
    try:
        if text.endswith("/"):
            names = [x for x in system.ls(path, detail=False) if _suffix(x) in SUFFIXES]
        else:
            names = system.glob(path)
    except OSError as error:
        raise UserError(f"--input {text} cannot be listed: {error}") from error
    if not names:
        raise UserError(f"--input {text}: no such image")
    return [system.unstrip_protocol(name) for name in sorted(names)]


def _listed(path: str) -> list[ImageRecord]:
    """Images of a text file; relative paths start from its folder. Those that do not exist show
    when they are read."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"--input {path} cannot be read: {reason}") from error
    folder, found = os.path.dirname(path), []
    for line in filter(None, map(str.strip, lines)):
        place = line if is_address(line) else os.path.join(folder, os.path.expanduser(line))
        found.append(ImageRecord(0, place, place))
    if not found:
        raise UserError(f"--input {path}: the list is empty")
    return found


def _coco_records(path: str, image_root: str | None) -> tuple[list[ImageRecord], list[dict]]:
    if is_address(path):
        raise UserError(f"--input {path}: a COCO file has to be here; only images may be elsewhere")
    data = read_json(path)
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not images:
        raise UserError(f"--input {path} lists no 'images'; a .json file has to be a COCO file")
    folder = os.path.dirname(path)
    said = (data.get("info") or {}).get(IMAGES) if isinstance(data.get("info"), dict) else None
    places = [os.path.join(folder, said)] if isinstance(said, str) else []
    places += [os.path.join(folder, "images"), folder]
    if image_root is None:
        image_root = next((p for p in places if os.path.isdir(p)), folder)
    found, seen = [], set()
    for number, image in enumerate(images, start=1):
        known = image if isinstance(image, dict) else {}
        key, name = known.get("id"), known.get("file_name")
        if type(key) is not int or not isinstance(name, str) or key in seen:
            raise UserError(
                f"--input {path}: image {number} needs a file_name and an id of its own that is a "
                "whole number"
            )
        seen.add(key)
        place = place_below(image_root, name)
        place = place if is_address(place) else os.path.normpath(place)
        found.append(ImageRecord(key, name, place))
    categories = data.get("categories")
    known_names = isinstance(categories, list) and all(
        isinstance(c, dict) and type(c.get("id")) is int and isinstance(c.get("name"), str)
        for c in categories
    )
    return found, [{"id": c["id"], "name": c["name"]} for c in categories] if known_names else []


def _tar_records(place: str) -> list[ImageRecord]:
    """Images in a tar file as webdataset writes it, each by its place in the file."""
    try:
        with open_binary(place) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = [m for m in archive if m.isreg() and _suffix(m.name) in SUFFIXES]
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"--input {place} is no tar file that can be read: {reason}") from error
    if not members:
        raise UserError(f"--input {place}: the tar file holds no images")
    spans = [(m.offset_data, m.size) for m in members]
    return [ImageRecord(0, f"{place}/{m.name}", place, s) for m, s in zip(members, spans)]


def _open_video(text: str) -> Source:
    camera = text.startswith(_CAMERA)
    if camera and not text.removeprefix(_CAMERA).isdigit():
        raise UserError(f"--input {text}: a webcam has a number, {_CAMERA}0 is the first")
    if not camera and not is_address(text) and not os.path.isfile(text):
        raise UserError(f"--input {text}: no such video")
    capture = cv2.VideoCapture(int(text.removeprefix(_CAMERA)) if camera else text)
    if not capture.isOpened():
        what = "webcam" if camera else "video"
        raise UserError(f"--input {text}: this {what} cannot be opened")
    stated = 0 if camera else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    rate = capture.get(cv2.CAP_PROP_FPS)
    total = stated if stated > 0 else None
    return Source(_frames(text, capture, total), total, frame_rate=rate if rate > 0 else 25.0)


def _frames(text: str, capture, total: int | None) -> Iterator[ImageRecord]:
    stem = text.replace(_CAMERA, "webcam") if text.startswith(_CAMERA) else text
    try:
        for number in itertools.count(1):
            there, frame = capture.read()
            if not there:
                break
            name = f"{os.path.splitext(stem)[0]}_{number:06d}{os.path.splitext(stem)[1]}"
            yield ImageRecord(number, name, pixels=frame)
        if total is not None and number - 1 < total:
            logger.warning("%s says %d frames, %d could be read", text, total, number - 1)
    finally:
        capture.release()
