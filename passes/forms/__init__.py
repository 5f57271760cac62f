"""Passes that bring the float graph into the form that a target's kernels and scales want, without data."""

ORDER = (
    "canonicalize", "unify-qdq", "fold-pad", "fold-bn", "fold-dims", "space-to-depth", "gelu-order", "opset", "fuse-norm",
    "split-qkv", "pad-heads", "bias-rank",
)  # fmt: skip
"""The order in which the planner inserts those that a target wants."""
