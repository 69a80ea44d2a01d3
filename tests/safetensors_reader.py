#!/usr/bin/env python3
"""Reads a safetensors file, checks it, and prints what is in it.

    safetensors_reader.py FILE     per tensor, in the order of the bytes: its name, dtype, shape and the CRC-32 of them

Written from the description of the format at https://github.com/huggingface/safetensors, "Format"; it shares nothing
with model/safetensors.c, whose files it tests. What is wrong with a file is one line on stderr, and exit status 1.
Standard library only. Used by tests/test_hf_tensors.c.
"""
import json
import struct
import sys
import zlib

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
         "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}
LONGEST_HEADER = 100_000_000


class Wrong(Exception):
    pass


def require(condition, what):
    if not condition:
        raise Wrong(what)


def without_duplicates(pairs):
    keys = [key for key, _ in pairs]
    require(len(set(keys)) == len(keys), f"a key stands twice in the header: {sorted(keys)[:4]}..")
    return dict(pairs)


def is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_header(data):
    """The header as a dict, and the bytes behind it."""
    require(len(data) >= 8, "too short for the length of the header")
    length = struct.unpack("<Q", data[:8])[0]
    require(length <= LONGEST_HEADER, f"a header of {length} bytes, {LONGEST_HEADER} are allowed")
    require(8 + length <= len(data), "the header is longer than the file")
    text = data[8:8 + length]
    require(text[:1] == b"{", "the header does not begin with {")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except ValueError as error:
        raise Wrong(f"the header is not JSON in UTF-8: {error}") from None
    require(text.rstrip(b" ").endswith(b"}"), "the header is padded with something else than spaces")
    return header, data[8 + length:]


def check_tensor(name, tensor, size):
    require(isinstance(tensor, dict) and set(tensor) == {"dtype", "shape", "data_offsets"}, f"{name}: wrong keys")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    require(dtype in BYTES, f"{name}: unknown dtype {dtype}")
    require(isinstance(shape, list) and all(map(is_size, shape)), f"{name}: shape {shape}")
    require(isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets)), f"{name}: data_offsets")
    begin, end = offsets
    require(begin <= end <= size, f"{name}: data_offsets {offsets} in {size} bytes")
    count = 1
    for extent in shape:
        count *= extent
    require(count * BYTES[dtype] == end - begin, f"{name}: {end - begin} bytes for {shape} of {dtype}")


def read(data):
    """Name, dtype, shape and bytes of each tensor, in the order of the bytes."""
    header, values = read_header(data)
    metadata = header.pop("__metadata__", {})
    require(isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()),
            "__metadata__ is not an object of strings")
    require(metadata.get("format") == "pt", "__metadata__ has no format pt, which transformers asks for")
    for name, tensor in header.items():
        check_tensor(name, tensor, len(values))
    at = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = tensor["data_offsets"]
        require(begin == at, f"{name}: begins at {begin}, the tensor before it ends at {at}")
        at = end
        yield name, tensor["dtype"], tensor["shape"], values[begin:end]
    require(at == len(values), f"{len(values) - at} bytes behind the last tensor")


def main():
    try:
        with open(sys.argv[1], "rb") as file:
            data = file.read()
        for name, dtype, shape, values in list(read(data)):
            print(name, dtype, "x".join(map(str, shape)), format(zlib.crc32(values), "08x"))
    except (Wrong, OSError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")


if __name__ == "__main__":
    main()
