"""The structures that passes look for: one import for all finders; each returns what was found, and what was refused and why.

Finders read the graph and never change it; they take linear time and assume canonicalize ran (shapes inferred, constants folded),
but only refuse, never fail, where it did not.
"""

from __future__ import annotations

from qcompile.structure.activation import Activation, find_activations, match_activation
from qcompile.structure.attention import Attention, Part, find_attentions, head_channel_columns
from qcompile.structure.channels.heads import Projection
from qcompile.structure.conv import ConvChain, find_conv_chains
from qcompile.structure.core import Matches, Refusal, Site
from qcompile.structure.folds import NormToLinears, find_norm_to_linears, match_norm_to_linears
from qcompile.structure.linear import Linear, find_linears, linears_by_output, match_linear
from qcompile.structure.mlp import Mlp, find_mlps, match_mlp
from qcompile.structure.norm import Norm, find_norms, match_norm
from qcompile.structure.stream import ResidualStream, find_residual_streams
from qcompile.structure.values import VProjection, find_v_projections, match_v_projection

__all__ = [
    "Activation",
    "Attention",
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
