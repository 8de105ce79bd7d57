"""What a compiled program sends between devices, loop by loop, and the memory that it needs.

Reads the text that the TPU, GPU and CPU compilers give, `compiled.as_text()`, because no other interface knows of
loops: a collective in a scan over 56 layers stands there once and runs 56 times. A loop is recognised by the scopes of
its `op_name`: those that `jax.named_scope` opened around it, "layers", "fam_scan" and "attention" in the decoder, and
what it went through: `transpose(jvp(layers))` is the backward pass, `rematted_computation` in it the forward pass done
again.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
MOVES = tuple(kind for kind in KINDS if kind != "all-reduce")  # those that move arrays

# Bytes that a program may use on a device, by `device_kind`. TPUs: what the compiler calls "available HBM" when it
# refuses a program that needs more (libtpu 0.0.50); a device of v3, v4 and TPU7x is one of a chip's two cores there.
# GPUs: all memory in XLA's target descriptions; JAX reserves three quarters of it, or XLA_PYTHON_CLIENT_MEM_FRACTION.
USABLE_BYTES = {
    "TPU v3": int(15.48 * 2**30),
    "TPU v4": int(15.25 * 2**30),
    "TPU v5 lite": int(15.75 * 2**30),
    "TPU v5": int(95.73 * 2**30),
    "TPU v6 lite": int(31.24 * 2**30),
    "TPU7x": int(94.74 * 2**30),
    "NVIDIA A100-SXM4-40GB": 42_331_013_120,
    "NVIDIA A100-SXM4-80GB": 85_100_068_864,
    "NVIDIA H100 80GB HBM3": 84_942_979_072,
    "NVIDIA H100 PCIe": 84_942_979_072,
    "NVIDIA H200": 151_397_597_184,
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind.

    Attributes:
        count: How many; compilers combine several arrays into one.
        bytes: Of their outputs, on one device. The CPU compiler turns bfloat16 into float32 first.
    """

    count: int = 0
    bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a program, or the program outside of its loops.

    Attributes:
        name: Of the `while` instruction; of the entry computation for the program itself.
        path: The `op_name` of each loop around it, outermost first, then its own; empty for the program itself.
        trips: Passes through the body each time that the loop runs, 1 for the program; None if the text does not say.
        executions: Passes through the body in a run of the program: `trips` times those of the loops around it.
        traffic: Collectives in one pass by kind, without those of loops inside. What both branches of a conditional
            send counts, as it is not known which is taken.
    """

    name: str
    path: tuple[str, ...]
    trips: int | None
    executions: int | None
    traffic: dict[str, Traffic]

    def within(self, scope: str) -> bool:
        """Whether the loop is, or lies in, one that was traced under `jax.named_scope(scope)`."""
        return any(re.search(rf"\b{re.escape(scope)}\b", name) for name in self.path)

    @property
    def label(self) -> str:
        """The own scopes, without the words that every loop has."""
        if not self.path:
            return "outside loops"
        words = {"while", "body", "cond", "checkpoint", "closed_call", "eval_jaxpr"}
        parts = [part for part in self.path[-1].split("/") if part not in words and not part.startswith("jit(")]
        return "/".join(parts) or self.name


class _Instruction(NamedTuple):
    name: str
    root: bool
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])


_Computations = dict[str, dict[str, _Instruction]]  # instructions by name, by computation


def read(text: str) -> list[Loop]:
    """The program outside of its loops, then every loop, each followed by those inside it.

    Args:
        text: The compiled program: `compiled.as_text()`.

    Raises:
        ValueError: The text is not that of a compiled program.
    """
    computations, entry = _parse(text)
    loops: list[Loop] = []

    def visit_loop(name: str, path: tuple[str, ...], trips: int | None, around: int | None, bodies: list[str]) -> None:
        executions = None if trips is None or around is None else trips * around
        traffic: dict[str, Traffic] = {}
        loops.append(Loop(name, path, trips, executions, traffic))
        for body in bodies:
            visit(body, traffic, path, executions)

    def visit(computation: str, traffic: dict[str, Traffic], path: tuple[str, ...], executions: int | None) -> None:
        for instruction in computations[computation].values():
            called = _called(instruction)
            if instruction.opcode == "while":
                scope = _OP_NAME.search(instruction.rest)
                inner = (*path, scope.group(1) if scope else "")
                visit_loop(instruction.name, inner, _trips(computations, computation, instruction), executions, called)
                continue
            kind = _kind(computations[computation].values(), instruction, called)
            if kind is not None:
                so_far = traffic.get(kind, Traffic())
                traffic[kind] = Traffic(so_far.count + 1, so_far.bytes + _bytes(instruction.shape))
            else:
                for name in called:
                    visit(name, traffic, path, executions)

    visit_loop(entry, (), 1, 1, [entry])
    return loops


def _parse(text: str) -> tuple[_Computations, str]:
    """The computations, and the name of that which is the program."""
    computations: _Computations = {}
    entry, current = None, None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}") and not line.startswith("}}"):  # lines of a kernel's attributes begin so, too
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, rest = match.groups()
            end = _end_of_shape(rest)
            opcode, _, rest_of_line = rest[end:].strip().partition("(")
            current[name] = _Instruction(name, root is not None, rest[:end], opcode, rest_of_line)
    if entry is None:
        raise ValueError("there is no ENTRY computation: give the text of a compiled program, compiled.as_text()")
    return computations, entry


def _end_of_shape(text: str) -> int:
    """Where the shape ends with which `text` begins: a tuple in parentheses, or a word."""
    if not text.startswith("("):
        return text.index(" ")
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"the tuple is not closed: {text[:100]}")


def _called(instruction: _Instruction) -> list[str]:
    """Computations that an instruction runs, but for what combines the elements of a reduction or a sort."""
    opcode, rest = instruction.opcode, instruction.rest
    if opcode.endswith(("-update", "-done")) or opcode.removesuffix("-start") in KINDS:
        return []  # what runs asynchronously is looked at where it starts, or is a collective and counts where it ends
    whole = opcode in ("call", "call-start")
    names = [name for how, name in _CALLED.findall(rest) if how != "to_apply" or whole]
    for group in _CALLED_LISTS.findall(rest):
        names += [name.strip().lstrip("%") for name in group.split(",") if name.strip()]
    return names


def _kind(computation: Iterable[_Instruction], instruction: _Instruction, called: list[str]) -> str | None:
    """The kind of collective that an instruction is, None if it is none or only part of one that counts elsewhere."""
    opcode = instruction.opcode
    if opcode == "fusion" and any(name.startswith("all-reduce-scatter") for name in called):
        return "reduce-scatter"  # TPU: a computation of an all-reduce and a slice, which is executed as one
    kind = opcode.removesuffix("-done")  # of a start and a done, the latter has the shape of the result
    # TPU: fused with the work that hides it, a collective stands in several computations, and ends in one of them.
    fused = "async_collective_fusion_config" in instruction.rest
    if fused and not any('custom_call_target="AsyncCollectiveDone"' in other.rest for other in computation):
        return None
    return kind if kind in KINDS else None


def _bytes(shape: str) -> int:
    """Bytes of an array or of all arrays in a tuple, without padding."""
    total = 0
    for dtype, dimensions in _SHAPE.findall(shape):
        width = re.search(r"\d+", dtype)
        bits = int(width.group()) if width else {"pred": 8}.get(dtype, 0)
        sizes = [int(size.lstrip("<=")) for size in dimensions.split(",") if size]
        total += -(-bits * math.prod(sizes) // 8)
    return total


def _trips(computations: _Computations, around: str, loop: _Instruction) -> int | None:
    """Passes of a loop: as the compiler notes them, else (TPU) from its counter's start, step and limit.

    The step need not be one: the loops that TPU's compiler makes of a product with a gathered matrix take two shards
    at a time.
    """
    if known := _TRIPS.search(loop.rest):
        return int(known.group(1))
    names = dict(_CALLED.findall(loop.rest))
    condition, body = computations[names["condition"]], computations[names["body"]]
    test = next(instruction for instruction in condition.values() if instruction.root)
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter = re.search(r"\bindex=(\d+)", condition[test.operands[0]].rest)
    before = computations[around][loop.operands[0]]
    after = next(instruction for instruction in body.values() if instruction.root)
    if counter is None or before.opcode != "tuple" or after.opcode != "tuple":
        return None
    place = int(counter.group(1))
    following = body[after.operands[place]]
    found = [_constant(body, name) for name in following.operands] if following.opcode == "add" else []
    steps = [step for step in found if step is not None]
    start, limit = _constant(computations[around], before.operands[place]), _constant(condition, test.operands[1])
    if start is None or limit is None or len(steps) != 1:
        return None
    return max(0, -(-(limit - start) // steps[0]))


def _constant(computation: dict[str, _Instruction], name: str) -> int | None:
    """The value of an integer constant or of its copy; None if it is something else."""
    instruction = computation[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _constant(computation, instruction.operands[0])
    integer = instruction.opcode == "constant" and re.match(r"[su]\d+\[\]", instruction.shape)
    return int(instruction.rest.partition(")")[0]) if integer else None


def total_bytes(loops: Iterable[Loop], scope: str | None = None) -> int:
    """Bytes that a device gets from collectives in a run of the program.

    Args:
        loops: All of them.
        scope: Count only loops that are `within` it.

    Raises:
        ValueError: A loop with collectives has no known number of passes.
    """
    total = 0
    for loop in loops:
        if not loop.traffic or (scope is not None and not loop.within(scope)):
            continue
        if loop.executions is None:
            raise ValueError(f"the loop {loop.name} ({loop.label}) has no known number of passes")
        total += loop.executions * sum(traffic.bytes for traffic in loop.traffic.values())
    return total


def total_count(loops: Iterable[Loop], kinds: Sequence[str] = KINDS, scope: str | None = None) -> int:
    """Collectives of some kinds in a run of the program; arguments and errors as of `total_bytes`."""
    total = 0
    for loop in loops:
        found = sum(traffic.count for kind, traffic in loop.traffic.items() if kind in kinds)
        if not found or (scope is not None and not loop.within(scope)):
            continue
        if loop.executions is None:
            raise ValueError(f"the loop {loop.name} ({loop.label}) has no known number of passes")
        total += loop.executions * found
    return total


def table(loops: Sequence[Loop]) -> str:
    """Markdown: a row for each loop, deeper ones indented; number and MB of collectives in a run of the program.

    Where the number of passes is not known, those of one pass, marked with a question mark.
    """
    kinds = [kind for kind in KINDS if any(kind in loop.traffic for loop in loops)]
    lines = [f"| {' | '.join(('loop', 'trips', 'runs', *kinds))} |", "|---" * (3 + len(kinds)) + "|"]
    for loop in loops:
        cells = ["&nbsp;&nbsp;" * max(len(loop.path) - 1, 0) + f"`{loop.label}`"]
        cells += ["?" if number is None else f"{number:,}" for number in (loop.trips, loop.executions)]
        for kind in kinds:
            found, times = loop.traffic.get(kind), loop.executions or 1
            mark = " ?" if loop.executions is None else ""
            cells.append(f"{found.count * times:,}: {found.bytes * times / 1e6:,.3f}{mark}" if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_report(compiled: Any) -> dict[str, int]:
    """Bytes on one device of a compiled program, as its compiler states them.

    Args:
        compiled: What `jax.jit(f).lower(...).compile()` returns.

    Returns:
        `argument`, `output`, `temp`, `alias` (outputs that reuse arguments) and `peak`, the one to compare with
        `USABLE_BYTES`: `temp` is no bound on TPU, where it may exceed what is there. The CPU compiler's `peak` leaves
        out temporaries.
    """
    analysis = compiled.memory_analysis()
    sizes = {name: getattr(analysis, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    return sizes | {"peak": analysis.peak_memory_in_bytes}
