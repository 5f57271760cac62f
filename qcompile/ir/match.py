"""The structures that passes look for: one import for all finders; each returns what was found, and what was refused and why.

Finders read the graph and never change it; they take linear time and assume canonicalize ran (shapes inferred, constants folded),
but only refuse, never fail, where it did not.
"""

from __future__ import annotations

from qcompile.ir.match_core import Matches, Refusal, Site
from qcompile.ir.match_fold import NormToLinears, find_norm_to_linears, match_norm_to_linears
from qcompile.ir.match_linear import Linear, find_linears, linears_by_output, match_linear
from qcompile.ir.match_norm import Norm, find_norms, match_norm

__all__ = [
    "Linear",
    "Matches",
    "Norm",
    "NormToLinears",
    "Refusal",
    "Site",
    "find_linears",
    "find_norm_to_linears",
    "find_norms",
    "linears_by_output",
    "match_linear",
    "match_norm",
    "match_norm_to_linears",
]
