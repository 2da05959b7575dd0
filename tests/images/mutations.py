"""pydicom's own files, broken at random, read in a process that a decoder may bring down.

    python tests/images/mutations.py --count 5000

Each mutation depends on the seed and its own number alone; its number is printed before it is read,
so that the last line of a process that died names it: `--first NUMBER --count 1` repeats it.
"""

import argparse
import collections
import faulthandler
import json
import random
import time
from pathlib import Path

from memory import forget_peak, memory_mib

ENDS_OF_TEXT = 700  # bytes of a message that are kept for the summary
PIXELS = b"\xe0\x7f\x10\0"  # the tag of the pixels
LENGTH_OF_HEAD = 12  # of the element, before its value


def shipped_pictures(largest: int = 400_000) -> list[Path]:
    """The files with a picture that come with pydicom, in all of its transfer syntaxes."""
    import pydicom
    from pydicom.data import get_testdata_files

    found = []
    for path in sorted(map(Path, get_testdata_files())):
        if path.is_file() and path.suffix == ".dcm" and path.stat().st_size <= largest:
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True)
            if "Rows" in header:
                found.append(path)
    return found


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes replaced, lengths made huge, parts cut out, doubled or lost, in header or pixels.

    Most headers that are broken in several places never reach a decoder, so that half of the files
    keep theirs.
    """
    broken = bytearray(data)
    pixels = data.rfind(PIXELS) + LENGTH_OF_HEAD
    begin, end = rng.choice(((0, pixels), (pixels, len(data)), (pixels, pixels + 700)))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(begin, max(begin + 1, min(end, len(broken)) - 4))
        how = rng.random()
        if how < 0.6:
            broken[place : place + 1] = bytes([rng.randrange(256)])
        elif how < 0.8:
            broken[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff"))
        elif how < 0.9:
            del broken[place : place + rng.randint(1, 64)]
        else:
            broken[place:place] = broken[place : place + rng.randint(1, 64)]
    if rng.random() < 0.1:
        del broken[rng.randrange(len(broken)) :]
    return bytes(broken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    faulthandler.enable()

    from moellava.images import to_pil

    files = [(path.name, path.read_bytes()) for path in shipped_pictures()]
    for _, data in files:  # imports what the decoders need
        to_pil_or_error(to_pil, data)
    forget_peak()
    before, ends, faults = memory_mib("VmRSS"), collections.Counter(), []
    slowest = (0.0, "")
    for number in range(asked.first, asked.first + asked.count):
        rng = random.Random(f"{asked.seed} {number}")
        name, data = rng.choice(files)
        print(number, name, flush=True)
        started = time.monotonic()
        error = to_pil_or_error(to_pil, mutated(data, rng))
        slowest = max(slowest, (time.monotonic() - started, f"{number} {name}"))
        ends["picture" if error is None else type(error).__name__] += 1
        if error is not None and not (
            isinstance(error, ValueError) and str(error).startswith("The encoded image")
        ):
            faults.append(f"{number} {name}: {type(error).__name__} {str(error)[:ENDS_OF_TEXT]}")
    print(
        json.dumps(
            {
                "files": len(files),
                "ends": ends,
                "faults": faults,
                "slowest": slowest,
                "mib_above_before": memory_mib("VmHWM") - before,
            }
        )
    )


def to_pil_or_error(to_pil, data: bytes) -> BaseException | None:
    try:
        to_pil(data)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return error
    return None


if __name__ == "__main__":
    main()
