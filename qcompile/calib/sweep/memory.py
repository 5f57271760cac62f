"""How much memory a sweep needs, predicted, and the probes spread over as few sweeps as fit a limit.

peak = max(loading, running) + the statistics of all sweeps
loading = the kernels' packed copies of weights that a session shares (none of a large model: its kernels read in place), and
          four copies of what travels in the serialized graph
running = those packed copies, what the graph computes from weights, the largest set of tensors alive at once
          + twice what leaves the session (the outputs of this batch, and of the one before, which is being merged)
          + the sweep's statistics once more, while they are merged

Measured (ONNX Runtime 1.32, glibc): loading 392 MiB of shared weights takes 411, 76 take 82.  With merging slowed down until
every batch waits for the one before: 247 of 371 predicted MiB (linear layers, whose outputs are 120 MiB a batch), 376 of 440
(a transformer of 76 MiB).  In blocks, beside other work: 107 MiB of the transformer, 190 without `give_back`.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import Arrays
from qcompile.calib.observe import Probe
from qcompile.calib.sweep.graphs import named_values
from qcompile.calib.sweep.instrument import Instrumented, instrument
from qcompile.errors import UsageError
from qcompile.execute.opening import is_shared
from qcompile.ir.cut import computed_bytes
from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.ir.spill import is_large

_BASE = 32 << 20  # the interpreter's, ONNX Runtime's and the kernels' own working memory
_UNKNOWN = 4096
_NUMBER = 8
_SERIALIZED = 4  # the message, its bytes, ONNX Runtime's copies of both
_MARGIN = 1.25  # allocators round up and keep pieces
_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE = 1 << 20


@dataclass(frozen=True)
class SweepPlan:
    """One sweep: its probes, and the bytes that the process is predicted to grow by."""

    probes: tuple[Probe, ...]
    predicted_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The sweeps that answer all probes at `batch` samples a run; of each of `blocks` parts of a large model at least one."""

    sweeps: tuple[SweepPlan, ...]
    batch: int
    blocks: int = 1

    @property
    def predicted_bytes(self) -> int:
        """The largest of the sweeps'."""
        return max((s.predicted_bytes for s in self.sweeps), default=0)


def plan_memory(model: Model, data: Dataset, probes: Sequence[Probe], batch: int, mem_limit: int | None = None) -> MemoryPlan:
    """As few sweeps as keep each below `mem_limit` bytes (one without a limit).

    The probes of one tensor stay together: they share its memory.

    Raises:
        UsageError: one tensor's probes alone do not fit; the message says which batch size or limit would do.
    """
    sizes = functools.cache(functools.partial(tensor_bytes, model, data))
    return MemoryPlan(tiled(model, sizes, probes, batch, mem_limit, statistics_bytes(model, probes)), batch)


def tiled(
    model: Model, sizes: Callable[[int], dict[str, int]], probes: Sequence[Probe], batch: int, mem_limit: int | None, held: int
) -> tuple[SweepPlan, ...]:
    """The sweeps of `plan_memory`; `sizes` gives the bytes of every tensor at a batch size, `held` those of all statistics.

    Raises as `plan_memory`.
    """
    tensors = list(dict.fromkeys(p.tensor for p in probes))

    def sweep_of(names: Sequence[str], size: int = batch) -> SweepPlan:
        chosen = tuple(p for p in probes if p.tensor in set(names))
        return SweepPlan(chosen, predict(model, sizes(size), chosen, held))

    def need(tensor: str, size: int) -> int:
        return sweep_of([tensor], size).predicted_bytes

    whole = sweep_of(tensors)
    if mem_limit is None or whole.predicted_bytes <= mem_limit:
        return (whole,)
    sweeps: list[SweepPlan] = []
    rest = tensors
    while rest:
        found = _longest(sweep_of, rest, mem_limit)
        if found is None:
            raise UsageError(_refusal(functools.partial(need, rest[0]), rest[0], batch, mem_limit))
        count, sweep = found
        sweeps.append(sweep)
        rest = rest[count:]
    return tuple(sweeps)


def statistics_bytes(model: Model, probes: Sequence[Probe]) -> int:
    """Bytes of all statistics, which stay from sweep to sweep."""
    values = named_values(model)
    return sum(p.observer.nbytes(_shape(values[p.tensor])) for p in probes)


def predict(model: Model, sizes: dict[str, int], probes: Sequence[Probe], held: int) -> int:
    """Bytes that a sweep of `probes` makes the process grow by.

    Args:
        sizes: each tensor's bytes.
        held: bytes of the statistics of all sweeps.
    """
    made = instrument(model, probes)
    graph = made.model.graph
    packed, serialized = (0, 0) if is_large(graph) else _weights(graph)
    reduced = sizes | _appended(made, sizes)
    outputs = sum(reduced.get(str(o.name), 0) for o in graph.outputs)
    loading = packed + _SERIALIZED * serialized
    running = packed + 2 * serialized + computed_bytes(made.model) + _alive(graph, reduced)
    running += 2 * outputs + statistics_bytes(model, probes)
    return _BASE + with_margin(held + max(loading, running))


def _weights(graph: ir.Graph) -> tuple[int, int]:
    """Bytes of the weights that a session shares, and of those that travel in the serialized graph."""
    tensors = [t for v in graph.initializers.values() if (t := v.const_value) is not None]
    shared = sum(int(t.nbytes) for t in tensors if is_shared(t))
    return shared, sum(int(t.nbytes) for t in tensors) - shared


def give_back() -> None:
    """Let the system have what freed pieces the C library keeps for each thread (glibc's malloc_trim; elsewhere nothing)."""
    _glibc("malloc_trim", 0)


def keep_no_pieces() -> None:
    """From now on the system gets what this process frees at once, if it is large (glibc's mallopt; elsewhere nothing).

    glibc keeps freed pieces of up to 32 MiB in a heap of each thread, the more the busier the machine.  Measured: a sweep that
    grew by 179 to 285 MB grows by 86 to 90, for about 10 % more CPU time: fresh pages cost the system some.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)


def _glibc(function: str, *arguments: int) -> None:
    found = getattr(ctypes.CDLL(None), function, None) if sys.platform.startswith("linux") else None
    if found is not None:
        found(*arguments)


def with_margin(size: int) -> int:
    """`size` bytes as an allocator takes them."""
    return int(_MARGIN * size)


def _longest(sweep_of: Callable[[Sequence[str]], SweepPlan], tensors: list[str], limit: int) -> tuple[int, SweepPlan] | None:
    """The most of the first tensors that fit, by bisection (more probes never need less); None when not even one does."""
    low, high, best = 1, len(tensors), None
    while low <= high:
        middle = (low + high) // 2
        sweep = sweep_of(tensors[:middle])
        if sweep.predicted_bytes <= limit:
            low, best = middle + 1, (middle, sweep)
        else:
            high = middle - 1
    return best


def _refusal(need_at: Callable[[int], int], tensor: str, batch: int, limit: int) -> str:
    need = need_at(batch)
    what = f"a sweep of tensor {tensor!r} alone needs about {_mib(need)} at batch {batch}, --mem-limit is {_mib(limit)}"
    smaller = next((b for b in _halves(batch) if need_at(b) <= limit), None)
    advice = (
        f"use --batch {smaller}, or give at least {_mib(need)}"
        if smaller is not None
        else f"no batch size fits; give at least {_mib(need)}"
    )
    return f"{what}; {advice}"


def _halves(batch: int) -> list[int]:
    return [batch >> i for i in range(1, batch.bit_length()) if batch >> i]


def _mib(size: int) -> str:
    return f"{-(-size // (1 << 20))} MiB"


def tensor_bytes(model: Model, data: Dataset, batch: int) -> dict[str, int]:
    """Bytes of every tensor at `batch` samples of the data's largest shape; an unknown one is as large as the largest."""
    copy = model.clone()
    feeds = _largest_sample(data)
    for value in named_values(copy).values():
        if value.producer() is not None:
            value.shape = None
    for value in copy.graph.inputs:
        array = feeds.get(str(value.name))
        if array is not None:
            value.shape = ir.Shape(array.shape if data.alone or not array.ndim else [batch, *array.shape[1:]])
    infer_shapes(copy)
    known = {name: _bytes(value) for name, value in named_values(copy).items()}
    largest = max((size for size in known.values() if size is not None), default=0)
    return {name: largest if size is None else size for name, size in known.items()}


def _largest_sample(data: Dataset) -> Arrays:
    """One sample of the shape with the most values."""
    first_of = {data.reader.shape_key(i): i for i in reversed(data.index)}
    samples = [data.reader.read([i]) for i in first_of.values()]
    return max(samples, key=lambda s: sum(a.size for a in s.values()))


def _bytes(value: ir.Value) -> int | None:
    if value.shape is None or value.dtype is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return int(prod(d for d in value.shape if isinstance(d, int)) * value.dtype.itemsize)


def _appended(made: Instrumented, sizes: dict[str, int]) -> dict[str, int]:
    """Sizes of the appended nodes' outputs: as large as their input, but for what reduces."""
    values = named_values(made.model)
    found: dict[str, int] = {}
    for (tensor, reduction), reduced in made.reductions.items():
        found |= dict.fromkeys(reduced.names, _NUMBER)
        found |= dict.fromkeys(reduced.outputs, _left(values[tensor], reduction.axes, sizes.get(tensor, 0)))
    for node in made.model.graph:
        for out in node.outputs:
            source = node.inputs[0] if node.inputs else None
            if str(out.name) not in sizes and source is not None:
                grows = node.op_type == "Cast" and source.dtype == ir.DataType.FLOAT16
                found.setdefault(str(out.name), sizes.get(str(source.name), 0) * (2 if grows else 1))
    return found


def _left(value: ir.Value, axes: Sequence[int], size: int) -> int:
    """Bytes of a tensor of `size` bytes after a reduction over `axes`, at most."""
    shape = list(value.shape or ())
    kept = [d for i, d in enumerate(shape) if i not in axes]
    if all(isinstance(d, int) for d in kept):
        return _NUMBER * prod(d for d in kept if isinstance(d, int))
    return size // prod(d for i in axes if isinstance(d := shape[i], int)) if size else 0


def _alive(graph: ir.Graph, sizes: dict[str, int]) -> int:
    """The most bytes of tensors alive at once, in the graph's order; the outputs are counted by the caller."""
    last = {str(v.name): i for i, node in enumerate(graph) for v in node.inputs if v is not None}
    kept = {str(o.name) for o in graph.outputs}
    alive = peak = sum(sizes.get(str(v.name), 0) for v in graph.inputs)
    held: dict[str, int] = {}
    for i, node in enumerate(graph):
        for out in node.outputs:
            if str(out.name) not in kept:
                held[str(out.name)] = sizes.get(str(out.name), 0)
                alive += held[str(out.name)]
        peak = max(peak, alive)
        for name in {str(v.name) for v in (*node.inputs, *node.outputs) if v is not None}:
            if last.get(name, -1) <= i:
                alive -= held.pop(name, 0)
    return peak


def _shape(value: ir.Value) -> tuple[int, ...]:
    """A dimension of unknown length counts 4096."""
    return () if value.shape is None else tuple(d if isinstance(d, int) else _UNKNOWN for d in value.shape)
