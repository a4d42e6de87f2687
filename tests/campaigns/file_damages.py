"""What a disk, a network or a careless hand does to a file of a run: a bit, a byte, a block, its length, its place."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, random.Random, list[Path]], None]
"""Changes a file, perhaps by what is in the others."""


def flip_a_bit(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = bytearray(file.read_bytes())
    if data:
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def change_bytes(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 2, 8])):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    file.write_bytes(data)


def change_a_digit(file: Path, chance: random.Random, others: list[Path]) -> None:
    """What metadata is made of: sizes, offsets, shapes, versions."""
    data = bytearray(file.read_bytes())
    digits = [place for place, byte in enumerate(data) if chr(byte).isdigit()]
    if digits:
        data[chance.choice(digits)] = ord(chance.choice("0123456789-e."))
    file.write_bytes(data)


def zero_a_block(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = bytearray(file.read_bytes())
    start = chance.randrange(len(data) + 1)
    size = min(chance.choice([4, 64, 512, 4096]), len(data) - start)
    data[start : start + size] = bytes(size)
    file.write_bytes(data)


def truncate(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data) + 1)])


def extend(file: Path, chance: random.Random, others: list[Path]) -> None:
    with file.open("ab") as end:
        end.write(chance.randbytes(chance.choice([1, 16, 4096])))


def insert(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = file.read_bytes()
    place = chance.randrange(len(data) + 1)
    file.write_bytes(data[:place] + chance.randbytes(chance.choice([1, 4, 64])) + data[place:])


def nest_deeply(file: Path, chance: random.Random, others: list[Path]) -> None:
    file.write_text("[" * chance.choice([100, 5_000, 200_000]))


def delete(file: Path, chance: random.Random, others: list[Path]) -> None:
    file.unlink()


def replace_by_another(file: Path, chance: random.Random, others: list[Path]) -> None:
    shutil.copyfile(chance.choice(others), file.with_name("swapped"))
    file.with_name("swapped").rename(file)


def make_a_folder_of_it(file: Path, chance: random.Random, others: list[Path]) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: list[Damage] = [
    *[flip_a_bit] * 6,
    *[change_bytes] * 3,
    *[change_a_digit] * 3,
    *[zero_a_block] * 2,
    *[truncate] * 2,
    extend,
    insert,
    nest_deeply,
    delete,
    replace_by_another,
    make_a_folder_of_it,
]
