"""The structures that passes look for: one import for all finders; each returns what was found, and what was refused and why.

Finders read the graph and never change it; they take linear time and assume canonicalize ran (shapes inferred, constants folded),
but only refuse, never fail, where it did not.
"""

from __future__ import annotations

from qcompile.ir.match_act import Activation, find_activations, match_activation
from qcompile.ir.match_attention import Attention, Part, find_attentions, head_channel_columns
from qcompile.ir.match_conv import ConcatShortcut, ConvChain, find_concat_shortcuts, find_conv_chains
from qcompile.ir.match_core import Matches, Refusal, Site
from qcompile.ir.match_fold import NormToLinears, find_norm_to_linears, match_norm_to_linears
from qcompile.ir.match_heads import Projection
from qcompile.ir.match_linear import Linear, find_linears, linears_by_output, match_linear
from qcompile.ir.match_mlp import Mlp, find_mlps, match_mlp
from qcompile.ir.match_norm import Norm, find_norms, match_norm
from qcompile.ir.match_stream import ResidualStream, find_residual_streams
from qcompile.ir.match_values import VProjection, find_v_projections, match_v_projection

__all__ = [
    "Activation",
    "Attention",
    "ConcatShortcut",
    "ConvChain",
    "Linear",
    "Matches",
    "Mlp",
    "Norm",
    "NormToLinears",
    "Part",
    "Projection",
    "Refusal",
    "ResidualStream",
    "Site",
    "VProjection",
    "find_activations",
    "find_attentions",
    "find_concat_shortcuts",
    "find_conv_chains",
    "find_linears",
    "find_mlps",
    "find_norm_to_linears",
    "find_norms",
    "find_residual_streams",
    "find_v_projections",
    "head_channel_columns",
    "linears_by_output",
    "match_activation",
    "match_linear",
    "match_mlp",
    "match_norm",
    "match_norm_to_linears",
    "match_v_projection",
]
