#!/usr/bin/env python3
"""How a model gets to a machine that has no registry and takes only so much at a time: in pieces.

    python demo/gsm8k/pieces.py cut runs/gsm8k/pieces runs/gsm8k/model gsm8k_train.jsonl     # here
    python demo/gsm8k/pieces.py join runs/gsm8k/pieces runs/gsm8k                            # there

Files and folders become one zip file, which is cut. A piece is called 02-of-07-HASH, after its own content,
so that nothing else has to be sent. `join` says which pieces are missing or damaged, and checks each file.

Weights that came from a file of 8-bit numbers (Q8_0: 32 of them share a 16-bit scale) are such numbers times
such a scale, exactly. So they are sent as that: 8.5 bits instead of 32, and fewer once they are deflated,
because what was 5 bits before uses few of the 256 values. What is no such product is sent as it is.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 32  # weights that share a scale in Q8_0
LARGEST = 127  # of the numbers of a block, by magnitude: the scale is chosen so
NAME = re.compile(r"(\d+)-of-(\d+)-([0-9a-f]{12})")
MIB = 2**20


# --------------------------------------------------------------------------------------- weights and numbers


def as_numbers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(8-bit numbers, 16-bit scales) whose products are these fp32 values bit for bit, if there are any."""
    if values.size % BLOCK:
        return None
    blocks = values.reshape(-1, BLOCK)
    with np.errstate(all="ignore"):  # of other tensors anything may come out, and is found below
        scales = (np.abs(blocks).max(1, keepdims=True) / LARGEST).astype(np.float16)
        numbers = np.rint(np.nan_to_num(blocks / scales.astype(np.float32))).astype(np.int8)  # 0 / 0 is 0
        exact = as_values(numbers, scales).tobytes() == blocks.tobytes()
    return (numbers, scales) if exact else None


def as_values(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return numbers.reshape(-1, BLOCK).astype(np.float32) * scales.reshape(-1, 1).astype(np.float32)


def tensors_of(header: bytes) -> list[tuple[str, dict]]:
    """(name, {"dtype", "shape", "data_offsets"}) of a safetensors file, in the order of its bytes."""
    entries = json.loads(header[8:])  # the first 8 bytes are its length
    entries.pop("__metadata__", None)
    return sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"])


def add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Without the time of day, so that the same files make the same pieces."""
    archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, compresslevel=1)


def add_weights(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    """A safetensors file: its header as it is, then tensor by tensor."""
    with open(path, "rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
        add(archive, f"{name}/header", header)
        for tensor, entry in tensors_of(header):
            begin, end = entry["data_offsets"]
            content = file.read(end - begin)
            found = as_numbers(np.frombuffer(content, np.float32)) if entry["dtype"] == "F32" else None
            if found is None:
                add(archive, f"{name}/{tensor}/raw", content)
            else:
                numbers, scales = found
                add(archive, f"{name}/{tensor}/numbers", numbers.tobytes())
                add(archive, f"{name}/{tensor}/scales", scales.tobytes())


def weights_of(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """The bytes of a safetensors file, in their order."""
    names, header = set(archive.namelist()), archive.read(f"{name}/header")
    yield header
    for tensor, _ in tensors_of(header):
        if f"{name}/{tensor}/raw" in names:
            yield archive.read(f"{name}/{tensor}/raw")
        else:
            numbers = np.frombuffer(archive.read(f"{name}/{tensor}/numbers"), np.int8)
            scales = np.frombuffer(archive.read(f"{name}/{tensor}/scales"), np.float16)
            yield as_values(numbers, scales).tobytes()


# ----------------------------------------------------------------------------------------------- cut and join


def cut(out: str, sources: list[str], most: float) -> None:
    """Write files and folders as pieces of at most so many MiB to a folder, which must not be there yet."""
    os.makedirs(out)
    with tempfile.TemporaryFile(dir=out) as whole:
        with zipfile.ZipFile(whole, "w") as archive:
            hashes = {}
            for name, path in files_of(sources):
                hashes[name] = hash_of(path)
                if path.suffix == ".safetensors":
                    add_weights(archive, path, name)
                else:
                    add(archive, name, path.read_bytes())
            add(archive, "sha256.json", json.dumps(hashes).encode())
        size, piece = whole.tell(), int(most * MIB)
        count = -(-size // piece)
        whole.seek(0)
        for number in range(1, count + 1):
            content = whole.read(piece)
            name = f"{number:02}-of-{count:02}-{hashlib.sha256(content).hexdigest()[:12]}"
            Path(out, name).write_bytes(content)
    print(f"{out}: {count} pieces, {size / MIB:.1f} MiB of "
          f"{sum(path.stat().st_size for _, path in files_of(sources)) / MIB:.1f}")


def files_of(sources: list[str]) -> list[tuple[str, Path]]:
    """(name in the archive, file): a file by its own name, those of a folder below the folder's."""
    found = []
    for source in map(Path, sources):
        inside = [source] if source.is_file() else sorted(source.rglob("*"))
        found += [(str(path.relative_to(source.parent)), path) for path in inside if path.is_file()]
    return found


def hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def join(folder: str, out: str) -> None:
    """Make the files again, unless they are there. Exits with what is missing if not all pieces are there.

    The file joined.json beside them says what was made, and of which pieces; so these are read only once.
    """
    pieces = in_order(folder)
    names = [path.name for path in pieces]
    if were_joined(names, out):
        return
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as whole:  # the folder of pieces may be one that is only read
        for path in pieces:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:12] != NAME.fullmatch(path.name)[3]:
                sys.exit(f"pieces: {path} is damaged; send it again")
            whole.write(content)
        with zipfile.ZipFile(whole) as archive:
            hashes = json.loads(archive.read("sha256.json"))
            for name, wanted in hashes.items():
                path = Path(out, name)
                if not path.exists():
                    extract(archive, name, path, wanted)
    Path(out, "joined.json.writing").write_text(json.dumps({"pieces": names, "files": list(hashes)}))
    os.replace(Path(out, "joined.json.writing"), Path(out, "joined.json"))


def were_joined(pieces: list[str], out: str) -> bool:
    """Whether a folder has all files of these pieces, which are known by the hashes in their names."""
    path = Path(out, "joined.json")
    if not path.exists():
        return False
    known = json.loads(path.read_text())
    return known["pieces"] == pieces and all(Path(out, name).exists() for name in known["files"])


def in_order(folder: str) -> list[Path]:
    found = {path.name: path for path in Path(folder).glob("*-of-*") if NAME.fullmatch(path.name)}
    counts = {NAME.fullmatch(name)[2] for name in found}
    if len(counts) != 1:
        sys.exit(f"pieces: {folder} holds {'pieces of several archives' if counts else 'no pieces'}")
    numbers = {number_of(name) for name in found}
    missing = sorted(set(range(1, int(counts.pop()) + 1)) - numbers)
    if missing:
        sys.exit(f"pieces: {folder} lacks {', '.join(f'{number:02}' for number in missing)}")
    if len(numbers) < len(found):
        sys.exit(f"pieces: {folder} holds a piece twice, of several archives")
    return [found[name] for name in sorted(found, key=number_of)]


def number_of(name: str) -> int:
    return int(NAME.fullmatch(name)[1])  # not by the letters: 100 comes after 99


def extract(archive: zipfile.ZipFile, name: str, path: Path, wanted: str) -> None:
    """Write a file of the archive, complete and as it was, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.writing")
    with open(beside, "wb") as file:
        if path.suffix == ".safetensors":
            for content in weights_of(archive, name):
                file.write(content)
        else:
            with archive.open(name) as source:
                shutil.copyfileobj(source, file)
    if hash_of(beside) != wanted:
        sys.exit(f"pieces: {path} is not what it was before it was cut")
    os.replace(beside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cut", help="files and folders -> pieces")
    command.add_argument("out", help="folder for the pieces; must not be there")
    command.add_argument("sources", nargs="+", help="what to send")
    command.add_argument("--mib", type=float, default=58, help="MiB of a piece at most [58]")
    command = commands.add_parser("join", help="pieces -> files and folders")
    command.add_argument("folder", help="of the pieces")
    command.add_argument("out", help="folder to write to; what is there already is left alone")
    args = parser.parse_args()
    if args.command == "cut":
        cut(args.out, args.sources, args.mib)
    else:
        join(args.folder, args.out)


if __name__ == "__main__":
    main()
