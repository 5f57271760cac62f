"""Running engines on the GPU (see `process` for why in a process of its own).

Request: `module`, `engines` (paths), `folder` (where arrays go: `feeds.npz`, and `0.npz`, `1.npz` .. the outputs),
`runs`, `seed`.
Reply: `ok`, `version`, `errors`, and `milliseconds` ([[..] for each engine]).

Inputs are made up at the optimum shapes of the first engine's first profile.  The times are of the call with inputs
and outputs on the GPU: launch and synchronize, no transfers.
"""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.backend.process import collecting_logger, serve
from qcompile.execute.timing import interleaved, made_up

Feeds = dict[str, NDArray[Any]]


def infer(request: dict[str, Any], reply: dict[str, Any]) -> None:
    """Run the engines of `request`; fills `reply`.  Raises whatever TensorRT raises."""
    import polygraphy.backend.trt.util as trt_util
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    trt = importlib.import_module(request["module"])
    logger = collecting_logger(trt)
    trt_util.TRT_LOGGER = logger
    reply["version"], reply["errors"] = trt.__version__, logger.errors
    with contextlib.ExitStack() as stack:
        loaders = (TrtRunner(EngineFromBytes(BytesFromPath(path))) for path in request["engines"])
        runners = [stack.enter_context(r) for r in loaders]
        reply["milliseconds"] = measure(runners, Path(request["folder"]), request["runs"], request["seed"], to_device)
    reply["ok"] = True


def measure(
    runners: Sequence[Any], folder: Path, runs: int, seed: int, place: Callable[[Any, Feeds], Mapping[str, Any]]
) -> list[list[float]]:
    """Save the inputs and each runner's outputs, then time them all; `place` puts a runner's inputs on the GPU."""
    feeds = made_up_feeds(runners[0], seed)
    np.savez(folder / "feeds.npz", **{name: portable(x) for name, x in feeds.items()})  # pyright: ignore[reportArgumentType]
    for i, runner in enumerate(runners):
        outputs = {name: portable(np.asarray(x)) for name, x in runner.infer(fitting(runner, feeds)).items()}
        np.savez(folder / f"{i}.npz", **outputs)  # pyright: ignore[reportArgumentType]
    placed = [place(r, fitting(r, feeds)) for r in runners]
    calls = [_call(r, f) for r, f in zip(runners, placed, strict=True)]
    return interleaved(calls, runs, random.Random(seed))


def _call(runner: Any, feeds: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: runner.infer(feeds, copy_outputs_to_host=False)


def made_up_feeds(runner: Any, seed: int) -> Feeds:
    """Inputs at the optimum of the first profile."""
    rng = np.random.default_rng(seed)
    inputs = runner.get_input_metadata(use_numpy_dtypes=True)
    return {name: made_up(_optimum(runner.engine, name, i.shape), np.dtype(i.dtype), rng) for name, i in inputs.items()}


def _optimum(engine: Any, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if all(d >= 0 for d in shape):
        return tuple(shape)
    return tuple(engine.get_tensor_profile_shape(name, 0)[1])


def fitting(runner: Any, feeds: Feeds) -> Feeds:
    """The arrays that this engine takes, in its inputs' types."""
    inputs = runner.get_input_metadata(use_numpy_dtypes=True)
    return {name: np.ascontiguousarray(feeds[name], np.dtype(i.dtype)) for name, i in inputs.items()}


def portable(x: NDArray[Any]) -> NDArray[Any]:
    """A copy in a type that .npz files know: float32 in place of bfloat16 and 8-bit floats."""
    return np.array(x if x.dtype.kind in "biuf" else x.astype(np.float32))


def to_device(runner: Any, feeds: Feeds) -> Mapping[str, Any]:
    """Copies on the GPU; inputs that are shapes stay in the host's memory, as TensorRT wants them."""
    from polygraphy.cuda import DeviceArray

    def copy(name: str, x: NDArray[Any]) -> Any:
        return x if runner.engine.is_shape_inference_io(name) else DeviceArray(x.shape, x.dtype).copy_from(x)

    return {name: copy(name, x) for name, x in feeds.items()}


def main() -> int:
    """Serve one request."""
    return serve(infer, {"ok": False, "version": "", "errors": []})


if __name__ == "__main__":
    raise SystemExit(main())
