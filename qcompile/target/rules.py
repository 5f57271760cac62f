from __future__ import annotations
def check(model, target, gpus=()):
    return []
