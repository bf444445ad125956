"""Damaged and hostile files of every format: read, or refused in one line, within little memory."""

import random
import resource

import pytest

from d2ext.checkpoint.formats import read_file
from d2ext.errors import UserError

# Files of each format: 40,000 altogether; h5py takes milliseconds for one.
COUNTS = {
    "new.pth": 6_000,
    "old.pth": 5_000,
    "zoo.pkl": 6_000,
    "old.pkl": 6_000,
    "net.params": 6_000,
    "net.caffemodel": 6_000,
    "net.safetensors": 4_000,
    "net.caffemodel.h5": 1_000,
}
HUGE = [b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xff" * 4, b"\0\0\0\x7f", b"\0" * 7 + b"\x7f"]


def mutate(data, rng):
    """A copy with one of: flipped bits, changed bytes, a huge number, a missing or doubled part."""
    data = bytearray(data)
    kind = rng.randrange(6)
    position = rng.randrange(len(data))
    if kind == 0:
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.choice([1, 3, 10])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        number = rng.choice(HUGE)
        data[position : position + len(number)] = number
    elif kind == 3:
        del data[position:]
    elif kind == 4:
        del data[position : position + rng.randrange(1, 20)]
    else:
        data[position:position] = data[rng.randrange(len(data)) :][: rng.randrange(1, 60)]
    return bytes(data)


def memory():
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize("name", COUNTS)
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, samples, name):
    rng = random.Random(name)
    path = tmp_path / f"mutated-{name}"
    good = samples[name]
    before = memory()
    outcomes = {True: 0, False: 0}
    for _ in range(COUNTS[name]):
        path.unlink(missing_ok=True)  # the mapping of the former one may still be in use
        path.write_bytes(mutate(good, rng))
        try:
            weights = read_file(str(path)).weights
            outcomes[True] += 1
            assert sum(x.numel() for x in weights.values()) < 1 << 22
        except UserError as error:
            outcomes[False] += 1
            text = str(error)
            assert "\n" not in text and len(text) < 500 and str(path) in text
    assert min(outcomes.values()) > COUNTS[name] / 100, outcomes
    assert memory() - before < 100 << 20


def test_files_of_no_known_format_are_refused(tmp_path):
    contents = [
        b"",
        b"x",
        b"<html>not found</html>",
        b"\0" * 100,
        b"PK\x03\x04",
        b"\x80",
        b"\x80\x02",
    ]
    for name in ("a.pth", "a.pkl", "a.params", "a.caffemodel", "a"):
        for content in contents:
            path = tmp_path / name
            path.write_bytes(content)
            with pytest.raises(UserError) as error:
                read_file(str(path))
            assert "cannot be read: " in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        read_file(str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match="Is a directory"):
        read_file(str(tmp_path))
