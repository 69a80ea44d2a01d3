#!/usr/bin/env python3
"""Reads a GGUF file, checks it, and prints what is in it.

    gguf_reader.py FILE          keys, and of each tensor its name, shape (the slowest extent first), type and CRC-32
    gguf_reader.py --all FILE    the same with every element of long arrays

Written from the public description of the format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and from
what llama.cpp asks of a model of its architecture qwen3moe; it shares nothing with model/gguf.c, which it tests. What
is wrong with a file is one line on stderr, and exit status 1. Standard library only. Used by tests/gguf_fixture.h.
"""
import json
import math
import struct
import sys
import zlib

SCALARS = {0: ("uint8", "B"), 1: ("int8", "b"), 2: ("uint16", "H"), 3: ("int16", "h"), 4: ("uint32", "I"),
           5: ("int32", "i"), 6: ("float32", "f"), 10: ("uint64", "Q"), 11: ("int64", "q"), 12: ("float64", "d")}
BOOL, STRING, ARRAY = 7, 8, 9

# Tensor types whose values have a size of their own; the others, quantised in blocks, are not read here.
TENSOR_TYPES = {0: ("F32", 4), 1: ("F16", 2), 24: ("I8", 1), 25: ("I16", 2), 26: ("I32", 4), 27: ("I64", 8),
                28: ("F64", 8), 30: ("BF16", 2)}
SHOWN = 8  # elements of a long array


class Wrong(Exception):
    pass


def require(condition, what):
    if not condition:
        raise Wrong(what)


class Reader:
    """Takes values off the front of the file; nothing is believed about what is left."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        require(count <= len(self.data) - self.at, f"ends inside a value at byte {self.at}")
        self.at += count
        return self.data[self.at - count:self.at]

    def unpack(self, code):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self):
        text = self.take(self.unpack("Q"))
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise Wrong(f"a string before byte {self.at} is not UTF-8") from None

    def value(self, kind, depth=0):
        """A value and its type's name."""
        if kind in SCALARS:
            name, code = SCALARS[kind]
            return self.unpack(code), name
        if kind == BOOL:
            byte = self.unpack("B")
            require(byte <= 1, f"a bool is {byte}")
            return bool(byte), "bool"
        if kind == STRING:
            return self.string(), "string"
        require(kind == ARRAY and depth < 4, f"unknown type {kind} of a value before byte {self.at}")
        element, count = self.unpack("I"), self.unpack("Q")
        require(count <= len(self.data), f"an array of {count} elements in a file of {len(self.data)} bytes")
        values, name = [], SCALARS.get(element, ({BOOL: "bool", STRING: "string"}.get(element, "array"),))[0]
        for _ in range(count):
            values.append(self.value(element, depth + 1)[0])
        return values, f"array of {name}"


def read(data):
    """keys: name -> (value, type); tensors: list of (name, extents as in the file, type, bytes of its values)."""
    reader = Reader(data)
    require(reader.take(4) == b"GGUF", "does not begin with GGUF")
    version = reader.unpack("I")
    require(version == 3, f"has version {version}, not 3")
    tensor_count, key_count = reader.unpack("Q"), reader.unpack("Q")

    keys = {}
    for _ in range(key_count):
        name = reader.string()
        require(name and name not in keys, f"key '{name}' is empty or there twice")
        keys[name] = reader.value(reader.unpack("I"))

    infos, names = [], set()
    for _ in range(tensor_count):
        name = reader.string()
        require(name and len(name.encode()) < 64, f"tensor name '{name}' is empty or too long")
        require(name not in names, f"tensor '{name}' is there twice")
        names.add(name)
        dimensions = reader.unpack("I")
        require(1 <= dimensions <= 4, f"tensor {name} has {dimensions} dimensions")
        extents = [reader.unpack("Q") for _ in range(dimensions)]
        infos.append((name, extents, reader.unpack("I"), reader.unpack("Q")))

    alignment, kind = keys.get("general.alignment", (32, "uint32"))
    require(kind == "uint32" and alignment > 0 and alignment & (alignment - 1) == 0, f"alignment {alignment}, {kind}")

    def aligned(count):
        return -(-count // alignment) * alignment

    expected = 0
    for name, extents, kind, offset in infos:
        require(kind in TENSOR_TYPES, f"tensor {name} has type {kind}, which is not read here")
        require(offset % alignment == 0, f"tensor {name} lies at {offset}, no multiple of {alignment}")
        require(offset == expected, f"tensor {name} lies at {offset}, expected at {expected}")
        expected = aligned(offset + math.prod(extents) * TENSOR_TYPES[kind][1])

    require(not any(reader.take(aligned(reader.at) - reader.at)), "what pads the header is not zero")
    tensors = []
    for name, extents, kind, _ in infos:
        type_name, size = TENSOR_TYPES[kind]
        tensors.append((name, extents, type_name, reader.take(math.prod(extents) * size)))
        padding = min(aligned(reader.at), len(data)) - reader.at  # after the last tensor it may be missing
        require(not any(reader.take(padding)), f"what pads tensor {name} is not zero")
    require(reader.at == len(data), f"has {len(data) - reader.at} bytes after the last tensor")
    return keys, tensors


def check_vocabulary(get):
    """Returns the number of tokens."""
    require(get("tokenizer.ggml.model", "string") == "gpt2", "the tokenizer is not gpt2")
    get("tokenizer.ggml.pre", "string")
    tokens = get("tokenizer.ggml.tokens", "array of string")
    require(all(tokens) and len(set(tokens)) == len(tokens), "a token is empty or there twice")
    types = get("tokenizer.ggml.token_type", "array of int32")
    require(len(types) == len(tokens) and all(1 <= t <= 6 for t in types), "types do not fit the tokens")
    known = set(tokens)
    for merge in get("tokenizer.ggml.merges", "array of string"):
        left, space, right = merge.partition(" ")
        require(space and {left, right, left + right} <= known, f"merge '{merge}' is not of tokens")
    for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id"):
        require(get(key, "uint32") < len(tokens), f"{key} is not a token")
    get("tokenizer.ggml.add_bos_token", "bool")
    return len(tokens)


def check_qwen3moe(keys, tensors):
    """What llama.cpp needs to load the model, and to compute what its keys say."""
    def get(name, kind):
        require(name in keys, f"key {name} is missing")
        require(keys[name][1] == kind, f"key {name} is of type {keys[name][1]}, not {kind}")
        return keys[name][0]

    def number(name):
        value = get("qwen3moe." + name, "uint32")
        require(value > 0, f"key qwen3moe.{name} is 0")
        return value

    width, layers = number("embedding_length"), number("block_count")
    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    head = number("attention.key_length")
    experts, used, hidden = number("expert_count"), number("expert_used_count"), number("expert_feed_forward_length")
    number("context_length"), number("feed_forward_length")
    require(number("attention.value_length") == head, "keys and values differ in length")
    require(number("rope.dimension_count") == head and head % 2 == 0, "rotation must take all of a head")
    require(heads % kv_heads == 0, "heads are no multiple of key and value heads")
    require(used <= experts, "more experts are used than there are")
    require(get("qwen3moe.attention.layer_norm_rms_epsilon", "float32") > 0, "epsilon is not positive")
    require(get("qwen3moe.rope.freq_base", "float32") > 0, "the rotary base is not positive")
    vocabulary = check_vocabulary(get)

    expected = {"token_embd": [width, vocabulary], "output_norm": [width]}
    if any(name == "output.weight" for name, *_ in tensors):
        expected["output"] = [width, vocabulary]
    for layer in range(layers):
        for name, extents in {
                "attn_norm": [width], "attn_q": [width, heads * head], "attn_k": [width, kv_heads * head],
                "attn_v": [width, kv_heads * head], "attn_q_norm": [head], "attn_k_norm": [head],
                "attn_output": [heads * head, width], "ffn_norm": [width], "ffn_gate_inp": [width, experts],
                "ffn_gate_exps": [width, hidden, experts], "ffn_up_exps": [width, hidden, experts],
                "ffn_down_exps": [hidden, width, experts]}.items():
            expected[f"blk.{layer}.{name}"] = extents
    found = {name: extents for name, extents, *_ in tensors}
    for name, extents in expected.items():
        require(f"{name}.weight" in found, f"tensor {name}.weight is missing")
        require(found[f"{name}.weight"] == extents, f"{name}.weight is {found[name + '.weight']}, expected {extents}")
    require(len(found) == len(expected), "there are tensors that qwen3moe does not have")


def main():
    arguments = [a for a in sys.argv[1:] if a != "--all"]
    if len(arguments) != 1:
        sys.exit(__doc__)
    try:
        with open(arguments[0], "rb") as file:
            keys, tensors = read(file.read())
        if keys.get("general.architecture") == ("qwen3moe", "string"):
            check_qwen3moe(keys, tensors)
    except (OSError, Wrong) as problem:
        sys.exit(f"gguf_reader: {arguments[0]}: {problem}")
    for name, (value, kind) in keys.items():
        note = ""
        if isinstance(value, list):
            kind = f"{kind}[{len(value)}]"
            if len(value) > SHOWN and "--all" not in sys.argv:
                value, note = value[:SHOWN], " .."
        print(f"key {name} = {json.dumps(value)}{note} ({kind})")
    for name, extents, kind, values in tensors:
        print(f"tensor {name} {'x'.join(map(str, reversed(extents)))} {kind} crc32 {zlib.crc32(values):08x}")


if __name__ == "__main__":
    main()
