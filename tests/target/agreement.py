"""Does the rule checker agree with the builder about one graph?"""

from __future__ import annotations

from collections.abc import Iterator

from qcompile.target.check import check
from qcompile.target.tensorrt.rules import TRT_RULES
from tests.target.builds import Built, audited
from tests.target.fuzz import Case

EFFECT = {rule.id: rule.effect for rule in TRT_RULES}


def disagreements(case: Case, built: Built) -> Iterator[str]:
    """What checker and builder see differently.

    A finding of effect "refused" holds if no engine was built, one of effect "float" if its node does not run in the
    planned type; without findings of such an effect the model builds and each planned node runs in its type.
    Where a finding says "wrong", the engine may be refused as well.
    """
    found = check(case.model, "rtx", [case.gpu])
    refused = sorted({f.rule for f in found if EFFECT[f.rule] == "refused"})
    wrong = any(EFFECT[f.rule] == "wrong" for f in found)
    floats = {f.node: f.rule for f in found if EFFECT[f.rule] == "float"}
    if built.ok == bool(refused) and not (wrong and not built.ok):
        yield f"{'built' if built.ok else 'refused'} although the rules say {refused or 'it builds'}: {built.errors[-2:-1]}"
    for node in audited(case.model, built) if built.ok else ():
        name, planned = node.item.node, node.item.low_type
        if name in floats and node.reads is not None and node.reads == planned:
            yield f"{name} runs in {node.reads} although {floats[name]} says float"
        if name not in floats and planned is not None and node.reads != planned:
            yield f"{name} is planned in {planned} but runs in {node.reads}: {[k.type for k in node.kernels]}"
