"""What the campaign in `hostile` does to a run: strange files, spliced metadata, and data that claims too much."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorstore as ts
import zstandard

from tests.campaigns.file_damages import DAMAGES
from tests.helpers.forgery import (
    MANIFEST_MAGIC,
    NODE_MAGIC,
    body_of,
    bomb,
    database,
    manifest_file,
    packed,
    rewrite,
    varint,
)

Mutation = Callable[[Path, random.Random], None]
"""Changes a run, which has the step 0."""


def files_of(run: Path) -> list[Path]:
    """The files of the run's steps and bases, in an order of their own."""
    return sorted(file for file in run.rglob("*") if file.is_file() and not file.name.startswith("."))


def a_file(run: Path, chance: random.Random) -> Path:
    return chance.choice(files_of(run))


def items_of(run: Path) -> list[Path]:
    """The folders with array data."""
    return sorted(file.parent for file in run.rglob("manifest.ocdbt") if "ocdbt.process" not in file.parent.name)


# ------------------------------------------------------------------------------------------------------ kinds of files


def fifo(run: Path, chance: random.Random) -> None:
    file = a_file(run, chance)
    file.unlink()
    os.mkfifo(file)


def a_socket(run: Path, chance: random.Random) -> None:
    file = a_file(run, chance)
    file.unlink()
    here = os.getcwd()
    os.chdir(file.parent)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(file.name)
    os.chdir(here)


def link_to_zeros(run: Path, chance: random.Random) -> None:
    file = a_file(run, chance)
    file.unlink()
    file.symlink_to("/dev/zero")


def link_to_itself(run: Path, chance: random.Random) -> None:
    file = a_file(run, chance)
    file.unlink()
    file.symlink_to(file.name)


def link_out_of_the_run(run: Path, chance: random.Random) -> None:
    """A file or a folder is replaced by a link to itself, moved out of the run."""
    file = chance.choice(sorted(path for path in run.rglob("*") if path.is_dir()) + files_of(run))
    outside = run.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)


def sparse(run: Path, chance: random.Random) -> None:
    with a_file(run, chance).open("ab") as file:
        file.truncate(1 << chance.choice([31, 36, 40]))


def folder_of_links(run: Path, chance: random.Random) -> None:
    folder = chance.choice(items_of(run))
    (folder / "d" / "loop").symlink_to("..")


# ------------------------------------------------------------------------------------------------------------ manifests


JUNK: list[Any] = [
    *(None, True, -1, 2**31, 2**62, 2**63, 10**400, 1e308, "", "../../x", "a\0b", "x" * 5000, [], {}),
    *(
        [2**62],
        [-1],
        [1, 2.5],
        [0, 2**61],
        [2**31, 2**31],
        {"$": "leaf", "name": "w", "as": "torch"},
        {"$": "same", "number": 9},
    ),
    *({"$": "int", "value": "f" * 100_000}, {"$": "float", "value": "1e999"}, {"$": "bytes", "value": "?"}),
    *("float32", "uint8", "complex128", "NaN", "2020-01-01T00:00:00", float("nan"), float("inf")),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """All containers in a JSON value, each with each of its keys."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in children for found in ((value, key), *places(child))]


def spliced_manifest(run: Path, chance: random.Random) -> None:
    def change(content: Any) -> None:
        for _ in range(chance.choice([1, 1, 2])):
            container, key = chance.choice(places(content))
            if isinstance(container, dict) and chance.random() < 0.2:
                container[chance.choice(["../../x", "", "$", "values", "w"])] = container.pop(key)
            else:
                container[key] = chance.choice(JUNK)

    rewrite(run, change)


def manifest_text(run: Path, chance: random.Random) -> None:
    """Texts that are expensive, or impossible, to parse."""
    text = manifest_file(run).read_text()[:-1]
    texts: list[Callable[[], str]] = [
        lambda: "[" * 1_000_000,
        lambda: '{"a":' * 1_000_000,
        lambda: text + ', "x": [' + "[]," * 20_000_000 + "0]}",
        lambda: text + ', "x": ' + "9" * 1_000_000 + "}",
        lambda: text + ', "x": 1e999999}',
        lambda: text + ', "x": "' + "\\u0000" * 1_000_000 + '"}',
        lambda: "\0" * 1_000_000,
        lambda: text + ', "items": {}}',
    ]
    manifest_file(run).write_text(chance.choice(texts)())


def crowded_manifest(run: Path, chance: random.Random) -> None:
    """Very many processes, leaves or ties."""
    count = chance.choice([100, 20_000])

    def change(content: Any) -> None:
        item = chance.choice(list(content["items"].values()))
        what = chance.choice(["own", "leaves", "ties"])
        if what == "own":
            content.update(processes=count, own={str(index): "0" * 64 for index in range(count)})
        elif what == "leaves" and item["leaves"]:
            some = chance.choice(list(item["leaves"].values()))
            item["leaves"].update({f"x{index}": some for index in range(count)})
        elif item["leaves"]:
            item["ties"].update(dict.fromkeys(map(str, range(count)), next(iter(item["leaves"]))))

    rewrite(run, change)


# ----------------------------------------------------------------------------------------------------------- array data


def arrays_of(data: ts.KvStore) -> list[str]:
    return sorted(key.decode().removesuffix("/.zarray") for key in data.list().result() if key.endswith(b"/.zarray"))


def described_otherwise(run: Path, chance: random.Random) -> None:
    """A `.zarray` that says something else, with the manifest or without it."""
    item = chance.choice(items_of(run))
    data = database(item)
    name = chance.choice(arrays_of(data))
    zarray = json.loads(data[f"{name}/.zarray"])
    shape = chance.choice([[2**62], [2**40], [2**31, 2**31], [0], [-1], [1] * 100, zarray["shape"]])
    changes: list[dict[str, Any]] = [
        {"shape": shape},
        {"shape": shape, "chunks": shape},
        {"shape": [2**40], "chunks": [chance.choice([1, 2**20, 2**40])], "dtype": "|u1"},
        {"chunks": [max(size, 1) << 20 for size in zarray["chunks"]]},
        {"chunks": [0 for _ in zarray["chunks"]]},
        {"dtype": chance.choice(["<f8", "|u1", "|O", "|S1000000000", "bfloat16", [["a", "<f4"]], 7])},
        {"compressor": {"id": chance.choice(["zlib", "blosc", "bz2", "gzip", "zstd", "x"]), "level": 9}},
        {"filters": [{"id": "delta"}]},
        {"fill_value": chance.choice([0, 1.5, "NaN"])},
        {"order": "F"},
        {"dimension_separator": "/"},
        {"zarr_format": chance.choice([1, 3, "2"])},
        {"x": "y" * chance.choice([10, 2_000_000])},
    ]
    change = chance.choice(changes)
    zarray.update(change)
    text = json.dumps(zarray)
    data[f"{name}/.zarray"] = chance.choice([text, text, text, "[" * 200_000, text[:-1], "null"])
    if "shape" in change and run.name != "base" and item.parent.name == "0" and item.parent.parent == run:
        dtype = {"dtype": "uint8"} if "dtype" in change else {}
        rewrite(run, lambda content: content["items"][item.name]["leaves"][name].update(shape=change["shape"], **dtype))


def chunks_otherwise(run: Path, chance: random.Random) -> None:
    """A chunk is missing, cut, too long, or that of another array."""
    data = database(chance.choice(items_of(run)))
    chunks = sorted(key for key in data.list().result() if not key.endswith(b"/.zarray"))
    key = chance.choice(chunks)
    value = data[key]
    values = [
        value[: len(value) // 2],
        value + b"\0" * 7,
        b"",
        value * 100,
        data[chance.choice(chunks)],
        bytes(20 << 20),
    ]
    if chance.random() < 0.2:
        del data[key]
    else:
        data[key] = chance.choice(values)


def unpacks_to_gigabytes(run: Path, chance: random.Random) -> None:
    """A compressed chunk is a bomb. An array that is not compressed becomes one that is."""
    data = database(chance.choice(items_of(run)))
    name = chance.choice(arrays_of(data))
    zarray = json.loads(data[f"{name}/.zarray"])
    zarray["compressor"] = {"id": "zstd", "level": 1}
    data[f"{name}/.zarray"] = json.dumps(zarray)
    honest = zstandard.ZstdCompressor().compress(bytes(100))
    size = chance.choice([1 << 20, 1 << 32, 1 << 36])
    key = f"{name}/" + ".".join(["0"] * max(len(zarray["shape"]), 1))
    data[key] = chance.choice([bomb(size), bomb(size, 400), bomb(400, 1 << 62), honest * 1000, honest + bomb(size)])


# --------------------------------------------------------------------------------------------------------------- index


def damaged(body: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(body))
    large = varint(chance.choice([2**14, 2**20, 2**32, 2**63 - 1, 2**64 - 1]))
    return chance.choice(
        [body[:at] + bytes([chance.randrange(256)]) + body[at + 1 :], body[:at] + large + body[at + 1 :]]
    )


def hostile_node(chance: random.Random) -> bytes:
    """The body of a node that claims what would take all memory, or all time."""
    no_files, one_file, many = varint(0), varint(1) + varint(1) + varint(0) + b"x", 1 << 20
    # Keys that share nearly all of their 64 KiB with each other.
    prefixes, suffixes = varint(65534) * (many - 1), varint(65535) + b"\1" * (many - 1)
    long_keys = no_files + varint(many) + prefixes + suffixes + b"a" * 65535 + b"b" * many
    long_value = varint(1) + varint(1) + b"a" + varint(1 << 50)
    return b"\0" + chance.choice(
        [
            long_keys,
            varint(1 << 40) + bytes(1 << 20),  # files
            no_files + varint(1 << 31),  # entries
            bytes(chance.choice([1 << 20, 1 << 28])),
            one_file + long_value + b"\1" + varint(0) + varint(0),
            no_files + long_value + b"\0",
        ]
    )


def hostile_index(run: Path, chance: random.Random) -> None:
    """The index of array data is damaged or made anew, with checksums that are right."""
    item = chance.choice(items_of(run))
    manifest = item / "manifest.ocdbt"
    whole = body_of(manifest.read_bytes())
    if chance.random() < 0.3:
        manifest.write_bytes(packed(MANIFEST_MAGIC, damaged(whole, chance)))
        return
    # A node is at the end of its file, after the values that have been written with it.
    nodes = [file for file in sorted((item / "d").iterdir()) if NODE_MAGIC in file.read_bytes()]
    node = chance.choice(nodes)
    content = node.read_bytes()
    values, old = content[: content.rfind(NODE_MAGIC)], content[content.rfind(NODE_MAGIC) :]
    new = packed(NODE_MAGIC, damaged(body_of(old), chance) if chance.random() < 0.6 else hostile_node(chance))
    node.write_bytes(values + new)
    manifest.write_bytes(packed(MANIFEST_MAGIC, whole.replace(varint(len(old)), varint(len(new)))))


# ----------------------------------------------------------------------------------------------------------------- all


def damaged_file(run: Path, chance: random.Random) -> None:
    """Damage that means no harm."""
    chance.choice(DAMAGES)(a_file(run, chance), chance, files_of(run))


def exchanged_folder(run: Path, chance: random.Random) -> None:
    """A folder takes the place of another one."""
    first, second = chance.choice(sorted(run.rglob("d"))), chance.choice(sorted(run.rglob("d")))
    if first != second:
        shutil.rmtree(first)
        shutil.copytree(second, first)


FORGED = (spliced_manifest, crowded_manifest, described_otherwise)
"""Mutations that sign the manifest again, so that other values than the saved ones may be restored."""

MUTATIONS: list[Mutation] = [
    *[damaged_file] * 8,
    exchanged_folder,
    *(fifo, a_socket, link_to_zeros, link_to_itself, link_out_of_the_run, folder_of_links, sparse),
    *[spliced_manifest] * 5,
    manifest_text,
    crowded_manifest,
    *[described_otherwise] * 3,
    *[chunks_otherwise] * 2,
    *[unpacks_to_gigabytes] * 2,
    *[hostile_index] * 4,
]
