"""A compiled program's text, read: what each instruction is, what it costs at least, and which layer asked for it.

The text is XLA's after all its passes (`compiled.as_text()`), so an instruction is what the device runs and what a
trace names: a fusion, a library call, a copy. What it costs is counted from shapes: floating-point operations of what
it computes, and the bytes it must read and write if nothing of it lay in a cache.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple


class Instruction(NamedTuple):
    """One that may be run by itself."""

    name: str
    kind: str  # one of KINDS
    layer: str  # "Block_0/Conv_1", below the model; or a named scope; "" where none is known
    backward: bool
    flops: float  # of one run
    bytes: float  # of one run

    @property
    def place(self) -> str:
        """Its layer in words."""
        return (self.layer or "(no layer)") + (", backward" if self.backward else "")


CONVOLUTION, MATMUL, COLLECTIVE, GATHER, REDUCTION, ELEMENTWISE, COPY, LOOP, OTHER = KINDS = (
    "convolution",
    "matrix product",
    "collective",
    "gather, scatter, sort",
    "reduction",
    "elementwise",
    "copy, transpose, pad",
    "loop",
    "other",
)

BYTES = {"pred": 1, "c64": 8, "c128": 16} | {f"{kind}{bits}": bits // 8 for kind in "sufb" for bits in (8, 16, 32, 64)}
BYTES |= {"bf16": 2}
FLOATS = ("f16", "bf16", "f32", "f64")
# an operation an element of the output
ARITHMETIC = """add subtract multiply divide maximum minimum negate abs power remainder exponential
    exponential-minus-one log log-plus-one sqrt rsqrt cbrt tanh logistic sine cosine floor round sign"""
MOVES = """copy copy-start copy-done transpose reshape broadcast slice pad concatenate bitcast bitcast-convert reverse
    convert parameter constant iota tuple get-tuple-element select compare"""
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective")
WHOLE = " (itself)"  # what a model does between its layers
GATHERS = ("gather", "scatter", "sort", "dynamic-slice", "dynamic-update-slice")
CONTROL = ("while", "conditional", "call")
SLICES = ("slice", "dynamic-slice", "gather")


class _Line(NamedTuple):
    """An instruction as it stands."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str  # attributes
    root: bool


def read(text: str) -> dict[str, Instruction]:
    """The instructions of a compiled program by name, those inside fusions left out."""
    computations: dict[str, list[_Line]] = {}
    lines: dict[str, _Line] = {}
    current: list[_Line] = []
    for row in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", row):
            current = computations[head[1]] = []
        elif line := _line(row):
            current.append(line)
            lines[line.name] = line
    inside = {called for line in lines.values() if line.opcode == "fusion" for called in _called(line)}
    return {
        line.name: _instruction(line, lines, computations)
        for name, body in computations.items()
        if name not in inside
        for line in body
    }


def _line(row: str) -> _Line | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$", row)
    if not found:
        return None
    root, name, shape, opcode, rest = found.groups()
    depth, end = 1, 0
    while depth and end < len(rest):  # to the bracket that ends the operands
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    return _Line(name, shape, opcode, re.findall(r"%([\w.\-]+)", rest[:end]), rest[end:], bool(root))


def _called(line: _Line) -> list[str]:
    return re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line.rest)


def _instruction(line: _Line, lines: Mapping[str, _Line], computations: Mapping[str, list[_Line]]) -> Instruction:
    body = [line]
    if line.opcode == "fusion":
        body = [inner for name in _called(line) for inner in computations.get(name, ())]
    flops = sum(_flops(inner, lines) for inner in body)
    layer, backward = _layer(line, body)
    return Instruction(line.name, _kind(line, body), layer, backward, flops, _traffic(line, body, lines))


# -- what it is --------------------------------------------------------------------------------------------------------


def _kind(line: _Line, body: list[_Line]) -> str:
    opcodes = {inner.opcode for inner in body}
    target = re.search(r'custom_call_target="([^"]*)"', line.rest)
    if target:
        return library_kind(target[1])
    if line.opcode in CONTROL:
        return LOOP
    if "convolution" in opcodes:
        return CONVOLUTION
    if "dot" in opcodes:
        return MATMUL
    if any(opcode.startswith(COLLECTIVES) for opcode in opcodes):
        return COLLECTIVE
    if opcodes & {"reduce", "reduce-window"}:
        return REDUCTION
    if opcodes.intersection(GATHERS):
        return GATHER
    return COPY if opcodes.issubset(MOVES.split()) else ELEMENTWISE


def library_kind(name: str) -> str:
    """Of a kernel, or of the function of a library, that has no instruction of its own."""
    words = {
        CONVOLUTION: "conv|fprop|dgrad|wgrad",
        MATMUL: "gemm|matmul|dot|nvjet|cutlass",
        COLLECTIVE: "nccl|all.?reduce|all.?gather",
        COPY: "memcpy|memset|copy|transpose",
        REDUCTION: "reduc",
        GATHER: "sort|scatter|gather|top.?k",
        ELEMENTWISE: "fusion",
    }
    return next((kind for kind, pattern in words.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def _layer(line: _Line, body: list[_Line]) -> tuple[str, bool]:
    """Of a product in it, else its own, else what most of it is of; what is of the model as a whole comes last."""
    heavy = [inner for inner in body if inner.opcode in ("convolution", "dot")]
    votes: dict[tuple[str, bool], float] = {}
    for weight, names in ((1e6, heavy), (1e3, [line]), (1, body)):
        for found in map(layer, filter(None, map(_op_name, names))):
            votes[found] = votes.get(found, 0) + weight
    votes.pop(("", False), None)
    deep = {found: weight for found, weight in votes.items() if not found[0].endswith(WHOLE)} or votes
    return max(deep, key=lambda found: deep[found]) if deep else ("", False)


def _op_name(line: _Line) -> str:
    found = re.search(r'op_name="([^"]*)"', line.rest)
    return found[1] if found else ""


def layer(op_name: str) -> tuple[str, bool]:
    """The named scopes of "jit(call)/jit(advance)/transpose(jvp(CNN))/Conv_1/conv_general_dilated": Conv_1, backward.

    The first scope is left out where another follows, as it is the whole model. Where several instructions became one,
    their names are joined by colons.
    """
    backward = "transpose(" in op_name
    scopes = {tuple(_scopes(name)) for name in op_name.split(":")}
    scopes.discard(())
    if len(scopes) != 1:
        return ("several layers" if scopes else ""), backward and bool(scopes)
    (found,) = scopes
    whole = len(found) == 1 and f"jvp({found[0]})" in op_name and found[0] != "loss"
    return "/".join(found[1:] or found) + (WHOLE if whole else ""), backward


def _scopes(op_name: str) -> list[str]:
    _, step, path = op_name.rpartition("jit(advance)/")
    parts = path.split("/")[:-1]  # the last is the primitive
    if not step and parts and parts[0].startswith("jit("):
        parts = parts[1:]
    scopes = []
    for part in parts:
        while wrapped := re.fullmatch(r"(?:jvp|transpose|vmap|checkpoint|rematted_computation)\((.*)\)", part):
            part = wrapped[1]
        if part.startswith(("jit(", "pjit")):
            break  # a function of jax
        if part and not re.fullmatch(r"while|body|cond|closed_call|branch_\d+_fun|custom_[jv]+p_call\w*|scan", part):
            scopes.append(part)
    return scopes


# -- what it costs -----------------------------------------------------------------------------------------------------


def _sizes(shape: str) -> list[tuple[str, list[int]]]:
    """(type, lengths) of the arrays of a shape, which may be a tuple."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape)
    return [(kind, [int(n) for n in lengths.split(",") if n]) for kind, lengths in found]


def _bytes(shape: str) -> int:
    return sum(BYTES.get(kind, 1) * math.prod(lengths) for kind, lengths in _sizes(shape))


def _flops(line: _Line, lines: Mapping[str, _Line]) -> float:
    out = _sizes(line.shape)
    operands = [sizes[0] for name in line.operands if name in lines and (sizes := _sizes(lines[name].shape))]
    if not out:
        return 0.0
    if "dim_labels=" in line.rest and len(operands) > 1:
        return _convolution(line, out[0][1], operands[0][1], operands[1][1])
    if operands and (axes := _contracted(line)) is not None:
        return 2.0 * math.prod(out[0][1]) * math.prod(operands[0][1][i] for i in axes)
    kind, lengths = out[0]
    if line.opcode in ARITHMETIC.split() and kind in FLOATS:
        return float(math.prod(lengths))
    if line.opcode in ("reduce", "reduce-window") and operands and operands[0][0] in FLOATS:
        return float(math.prod(operands[0][1]))
    return 0.0


def _contracted(line: _Line) -> list[int] | None:
    """Axes of the first operand that a matrix product sums over; None: it is none."""
    found = re.search(r'lhs_contracting_dims=\{([\d,]*)\}|"lhs_contracting_dimensions":\[([\d,"]*)\]', line.rest)
    return [int(n) for n in re.findall(r"\d+", found[0].partition("=")[2] or found[2])] if found else None


def _convolution(line: _Line, out: list[int], image: list[int], kernel: list[int]) -> float:
    """As in flops.py: each output takes from every tap, or each input gives to every tap, where that is the less."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    if not labels:
        return 0.0
    if "BackwardFilter" in line.rest:  # a library's: the labels are those of the forward convolution
        kernel, out = out, kernel
    elif "BackwardInput" in line.rest:
        image, out = out, image
    features = kernel[labels[2].index("o")]
    taps = math.prod(n for n, label in zip(kernel, labels[2], strict=True) if label.isdigit())
    groups = math.prod(int(n) for n in re.findall(r"(?:feature|batch)_group_count=(\d+)", line.rest))
    return 2.0 * min(
        math.prod(out) * math.prod(kernel) / features,
        math.prod(image) * taps * features / groups,
    )


def _traffic(line: _Line, body: list[_Line], lines: Mapping[str, _Line]) -> float:
    """Bytes of its operands and outputs; of what it only takes slices from, the slices."""
    if line.opcode in CONTROL or line.opcode in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast"):
        return 0.0
    if line.opcode in SLICES:
        return 2.0 * _bytes(line.shape)
    if line.opcode != "fusion":
        return float(_bytes(line.shape) + sum(_bytes(lines[name].shape) for name in line.operands if name in lines))
    total = 0.0
    for inner in body:
        if inner.opcode == "parameter":
            users = [user for user in body if inner.name in user.operands]
            if users and all(user.opcode in SLICES and user.operands[0] == inner.name for user in users):
                total += sum(_bytes(user.shape) for user in users)
            elif not any(user.opcode == "dynamic-update-slice" and user.operands[0] == inner.name for user in users):
                total += _bytes(inner.shape)  # but for one that is updated in its place
        elif inner.root:
            written = lines[inner.operands[1]].shape if inner.opcode == "dynamic-update-slice" else inner.shape
            total += _bytes(written)
    return total
