"""Identity nodes, in the main graph and in bodies: removed where no interface needs them."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.edit import redirect


def drop_identities(model: ir.Model) -> int:
    """Remove every Identity whose output may be its input; returns how many.

    One stays where a graph (or the body of an If, Loop or Scan) hands out an input, a constant, a value of the graph around it,
    or one value under two names.
    """
    found = [n for n in model.graph.all_nodes() if n.op_type == "Identity" and n.domain in ("", "ai.onnx")]
    return sum(_dropped(node) for node in found)


def _dropped(node: ir.Node) -> bool:
    source, out, graph = node.inputs[0], node.outputs[0], node.graph
    if source is None or graph is None:
        return False
    if out.is_graph_output() and not _takes_name(source, graph):
        return False
    redirect(out, source, list(out.uses()))
    if out.is_graph_output():
        _hand_out(graph, out, source)
    if source.type is None:
        source.type = out.type
    graph.remove(node, safe=True)
    return True


def _takes_name(source: ir.Value, graph: ir.Graph | ir.Function) -> bool:
    """Whether a value can be the output of `graph` in place of another."""
    producer = source.producer()
    return producer is not None and producer.graph is graph and not source.is_graph_output()


def _hand_out(graph: ir.Graph | ir.Function, out: ir.Value, source: ir.Value) -> None:
    name = out.name
    for i, each in enumerate(graph.outputs):
        if each is out:
            graph.outputs[i] = source
    out.name = None
    source.name = name
