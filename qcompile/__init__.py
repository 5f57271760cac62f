"""qcompile: an ONNX graph-transformation compiler pass suite for post-training quantization.

import qcompile
result = qcompile.compile("model.onnx", passes="repq,smooth", target="ort", calib="images.npz")

Also what passes are written with: the bases, probes and observers, the finders of structures, and the verbs that edit graphs.
Importing qcompile imports none of it: each name comes from its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qcompile._version import __version__ as __version__

if TYPE_CHECKING:
    from qcompile.calib.observe import AbsMax as AbsMax
    from qcompile.calib.observe import ChannelHistograms as ChannelHistograms
    from qcompile.calib.observe import Extremes as Extremes
    from qcompile.calib.observe import Histogram as Histogram
    from qcompile.calib.observe import MinMax as MinMax
    from qcompile.calib.observe import Moments as Moments
    from qcompile.calib.observe import Observer as Observer
    from qcompile.calib.observe import Probe as Probe
    from qcompile.calib.observe import Rows as Rows
    from qcompile.calib.observe import SecondMoment as SecondMoment
    from qcompile.calib.observe import Told as Told
    from qcompile.calib.observe.change import AffineMap as AffineMap
    from qcompile.calib.observe.change import Changes as Changes
    from qcompile.calib.observe.change import Foldable as Foldable
    from qcompile.decide.placement import Placement as Placement
    from qcompile.ir.edit import add_constant as add_constant
    from qcompile.ir.edit import erase as erase
    from qcompile.ir.edit import erase_dead as erase_dead
    from qcompile.ir.edit import insert_after as insert_after
    from qcompile.ir.edit import new_node as new_node
    from qcompile.ir.edit import redirect as redirect
    from qcompile.ir.edit import replace_value as replace_value
    from qcompile.ir.edit import set_constant as set_constant
    from qcompile.ir.edit import splice_after as splice_after
    from qcompile.ir.edit import swap_output as swap_output
    from qcompile.ir.model import Model as Model
    from qcompile.ir.surgeon import from_gs as from_gs
    from qcompile.ir.surgeon import surgery as surgery
    from qcompile.ir.surgeon import to_gs as to_gs
    from qcompile.pipeline.base import Kind as Kind
    from qcompile.pipeline.base import Needs as Needs
    from qcompile.pipeline.base import Pass as Pass
    from qcompile.pipeline.base import PassContext as PassContext
    from qcompile.pipeline.base import PassResult as PassResult
    from qcompile.pipeline.base import Rounds as Rounds
    from qcompile.pipeline.base import Stage as Stage
    from qcompile.pipeline.fold import Fold as Fold
    from qcompile.pipeline.fold import FoldPass as FoldPass
    from qcompile.pipeline.site import Applied as Applied
    from qcompile.pipeline.site import Missed as Missed
    from qcompile.pipeline.site import SitePass as SitePass
    from qcompile.rewrite.fold import FoldSite as FoldSite
    from qcompile.rewrite.linear import absorb_shift as absorb_shift
    from qcompile.rewrite.linear import divide_outputs as divide_outputs
    from qcompile.rewrite.linear import scale_inputs as scale_inputs
    from qcompile.rewrite.linear import scale_outputs as scale_outputs
    from qcompile.structure import Linear as Linear
    from qcompile.structure import Matches as Matches
    from qcompile.structure import Refusal as Refusal
    from qcompile.structure import find_activations as find_activations
    from qcompile.structure import find_attentions as find_attentions
    from qcompile.structure import find_conv_chains as find_conv_chains
    from qcompile.structure import find_linears as find_linears
    from qcompile.structure import find_mlps as find_mlps
    from qcompile.structure import find_norm_to_linears as find_norm_to_linears
    from qcompile.structure import find_norms as find_norms
    from qcompile.structure import find_residual_streams as find_residual_streams
    from qcompile.structure import find_v_projections as find_v_projections
    from qcompile.target.target import Choices as Choices
    from qcompile.target.target import Request as Request
    from qcompile.target.target import Target as Target
    from qcompile.verbs.compile.options import Options as Options
    from qcompile.verbs.compile.run import Result as Result
    from qcompile.verbs.compile.run import compile as compile

_FROM = {
    "calib.observe": (
        "AbsMax", "ChannelHistograms", "Extremes", "Histogram", "MinMax", "Moments", "Observer", "Probe", "Rows", "SecondMoment",
        "Told",
    ),
    "calib.observe.change": ("AffineMap", "Changes", "Foldable"),
    "decide.placement": ("Placement",),
    "ir.edit": (
        "add_constant", "erase", "erase_dead", "insert_after", "new_node", "redirect", "replace_value", "set_constant",
        "splice_after", "swap_output",
    ),
    "ir.model": ("Model",),
    "ir.surgeon": ("from_gs", "surgery", "to_gs"),
    "pipeline.base": ("Kind", "Needs", "Pass", "PassContext", "PassResult", "Rounds", "Stage"),
    "pipeline.fold": ("Fold", "FoldPass"),
    "pipeline.site": ("Applied", "Missed", "SitePass"),
    "rewrite.fold": ("FoldSite",),
    "rewrite.linear": ("absorb_shift", "divide_outputs", "scale_inputs", "scale_outputs"),
    "structure": (
        "Linear", "Matches", "Refusal", "find_activations", "find_attentions", "find_conv_chains", "find_linears", "find_mlps",
        "find_norm_to_linears", "find_norms", "find_residual_streams", "find_v_projections",
    ),
    "target.target": ("Choices", "Request", "Target"),
    "verbs.compile.options": ("Options",),
    "verbs.compile.run": ("Result", "compile"),
}  # fmt: skip
_HOME = {name: f"{__name__}.{module}" for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
