"""What a compilation is asked to do, in the groups that calibrating and building share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from qcompile.ir.select import Selection
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import DEFAULT, TARGETS
from qcompile.verbs.libraries import OrtLibraryOptions, PluginOptions
from qcompile.verbs.options import Written, size

DEFAULT_SAMPLES = 128
DEFAULT_GPU = "sm89"
_TITLES = "; ".join(f"{t.name}: {t.title}" for t in TARGETS.values())
_DELIVERED = tuple(s for s in SCHEMES if any(s in t.schemes for t in TARGETS.values()))
_SELECTORS = "a name (glob), re:REGEX, op:TYPE or region:FROM..TO"
_DATA = "npz, folder, pictures, file.py:function, polygraphy JSON or 'random'; default: MODEL.calib.npz beside MODEL."


def _data(folder: Path, text: str) -> str:
    return text if text == "random" else str(folder / text)


def _preset_or_file(folder: Path, text: str) -> str:
    return str(folder / text) if text.endswith(".toml") else text


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """What MODEL becomes."""

    passes: Annotated[str | None, "Pipeline, e.g. 'repq,smooth{alpha=0.6}'; default: the target's (see: qcompile passes)."] = None
    requantize: Annotated[bool, "Of a quantized MODEL: forget its scales and quantize the float model inside."] = False
    target: Annotated[str | None, f"Default {DEFAULT}. {_TITLES}.", Written(choices=TARGETS)] = None
    scheme: Annotated[
        str | None, "Default w8a8. Which target takes which: docs/guide/targets.md.", Written(choices=_DELIVERED)
    ] = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What it is calibrated on."""

    calib: Annotated[str | None, _DATA, Written("DATA", beside=_data)] = None
    samples: Annotated[int | None, f"Spread evenly over DATA; default: at most {DEFAULT_SAMPLES}.", Written(least=1)] = None
    batch: Annotated[int | None, "Samples a run of calibration; default: what the model takes, else 8.", Written(least=1)] = None
    preprocess: Annotated[str | None, "For pictures: a preset or a TOML file.", Written("SPEC", beside=_preset_or_file)] = None


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """Which nodes are quantized, and how ranges are found."""

    range: Annotated[
        Literal["minmax", "percentile", "entropy", "mse", "weighted", "search"] | None,
        "How activation ranges are found; default: mse for integers, minmax for floats.",
    ] = None
    keep_float: Annotated[tuple[str, ...], f"Leave these nodes in float: {_SELECTORS}. Repeatable.", Written("SELECTOR")] = ()
    only: Annotated[tuple[str, ...], "Quantize only these nodes; repeatable.", Written("SELECTOR")] = ()
    quantize: Annotated[
        tuple[str, ...], "Quantize these too, although the default leaves them in float.", Written("SELECTOR")
    ] = ()
    bits: Annotated[
        tuple[str, ...], "Integer target: other widths for these layers, e.g. 'fc*=w4a4'.", Written("SELECTOR=wXaY")
    ] = ()

    @property
    def selection(self) -> Selection:
        """The selectors of nodes."""
        return Selection(self.keep_float, self.only, self.quantize, self.bits)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How it runs."""

    seed: Annotated[int, "Of everything random.", Written(least=0)] = 0
    mem_limit: Annotated[
        int | None, "Of calibration, e.g. 4GiB; more sweeps where one is too large.", Written("SIZE", read=size)
    ] = None
    threads: Annotated[int | None, "ONNX Runtime threads; default: all cores.", Written(least=1)] = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions(PluginOptions):
    """What engines are built for."""

    gpu: Annotated[str, "For rtx; trt builds for this machine's GPU.", Written("SM,..")] = DEFAULT_GPU
    profiles: Annotated[
        tuple[str, ...],
        "Of dynamic inputs, e.g. 'x:1x3x32x32,8x3x32x32,32x3x32x32' (min, opt, max); repeatable: one profile each."
        " Default: from the calibration shapes.",
        Written("SHAPES", flag="--profile"),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions(OrtLibraryOptions, RunOptions, NodeOptions, DataOptions, PipelineOptions):
    """What decides which statistics a compilation asks for: the options that compiling and calibrating share."""


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions, StatisticsOptions):
    """What is written, and what must hold."""

    output: Annotated[Path | None, "Default here: MODEL.TARGET-SCHEME.onnx.", Written("OUT.onnx", short="-o", once=True)] = None
    engine: Annotated[Path | None, "Also build an engine (rtx and trt), and audit it (rtx).", Written("OUT", once=True)] = None
    report: Annotated[Path | None, "Write everything that happened.", Written("OUT.json", once=True)] = None
    remarks: Annotated[Path | None, "Write what happened at every site.", Written("OUT.json", once=True)] = None
    stats: Annotated[Path | None, "What qcompile calibrate gathered: no sweep.", Written("FILE")] = None
    verify: Annotated[Literal["each", "end", "off"], "Compare outputs."] = "each"
    min_sqnr: Annotated[float | None, "Fail (exit 1) if the output's SQNR is lower.", Written("DB")] = None
    exact: Annotated[bool, "Run exactly these passes, insert none."] = False
    strict: Annotated[bool, "Fail (exit 1) if one of your passes changes nothing."] = False
    print_after: Annotated[bool, "Print the graph after every pass, on standard error.", Written(once=True)] = False
