"""The plan of the house: who may import whom, where a pass stands, what may be called where, how long a file may be.

Imports count wherever they stand, at the top, inside functions and under TYPE_CHECKING: a reader follows them all.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator

from qcompile.pipeline import registry
from qcompile.pipeline.base import Kind
from qcompile.target.catalog import TARGETS
from tests.modules import Source, circles, edges, sources

PASS_BASES = ("pipeline.base", "pipeline.site", "pipeline.fold")
FOR_ALL = ("errors", "report", "_version")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "report": (),
    "_version": (),
    "quant": (),
    "ir": ("quant",),
    "structure": ("ir",),
    "oracle": (),  # judges what the other rooms made, with none of their code
    "execute": ("ir", "quant"),
    "calib": ("ir", "quant", "execute"),
    "decide": ("ir", "quant", "calib.observe"),
    "rewrite": ("ir", "structure", "quant", "decide", "calib.observe"),
    "target": ("ir", "structure", "quant", "decide", "oracle"),
    "pipeline": ("ir", "structure", "quant", "rewrite", "target", "calib.observe"),
    "passes": ("ir", "structure", "quant", "rewrite", "decide", "target", "calib.observe", *PASS_BASES),
    "backend": ("ir", "target", "execute"),
    "verbs": (*("ir", "quant", "structure", "oracle", "execute", "calib", "decide", "rewrite"), "target", "pipeline", "backend"),
    "cli": ("verbs",),
    "__main__": ("cli",),
}
HEAVY: dict[str, tuple[str, ...]] = {
    "tensorrt": ("backend",),
    "tensorrt_rtx": ("backend",),
    "polygraphy": ("backend", "calib"),
    "openvino": ("backend",),
    "onnxruntime": ("execute",),
    "onnx_graphsurgeon": ("ir", "passes"),
    "onnxscript": ("passes",),
    "distributed": ("execute",),
    "tritonclient": ("backend",),
    "PIL": ("calib",),
    "click": ("cli",),
    "rich": ("cli",),
}
FOLDERS = {
    "forms": Kind.EQUIVALENT,
    "equivalent": Kind.EQUIVALENT,
    "annotate": Kind.ANNOTATE,
    "fit": Kind.FIT,
    "lower": Kind.LOWER,
}
NO_CODE_FROM_DATA = {"eval", "exec", "pickle", "dill", "joblib", "shelve", "marshal"}
SOURCES = sources()


def inside(module: str, rooms: Iterable[str]) -> bool:
    """Whether a module of ours is one of these or stands in one of them."""
    return any(module == f"qcompile.{room}" or module.startswith(f"qcompile.{room}.") for room in rooms)


def ours() -> Iterator[tuple[Source, str, str]]:
    """Imports between our files; the package's face is not part of the house, it shows it."""
    return ((s, module, name) for s, module, name in edges(SOURCES) if s.name != "qcompile")


def test_imports_point_the_right_way() -> None:
    unknown = {s.room for s in SOURCES.values()} - {"", *MAY_IMPORT}
    assert not unknown, "give a new room its row in MAY_IMPORT and in docs/architecture.md"
    wrong = {f"{s.path}: {module}" for s, module, _ in ours() if not inside(module, (s.room, *MAY_IMPORT[s.room], *FOR_ALL))}
    assert not wrong


def test_files_make_no_circle() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for source, module, _ in edges(SOURCES):
        graph[source.name].add(module)
    assert not circles(graph)


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d", "f"}, "f": set[str]()}
    assert circles(graph) == [["a", "b", "c"], ["d", "e"]]


def test_private_names_stay_in_their_folder() -> None:
    def private(module: str, name: str) -> bool:
        return any(part.startswith("_") and part not in ("_version", "__version__") for part in (*module.split("."), name))

    assert not {f"{s.path}: {m}.{n}" for s, m, n in ours() if private(m, n) and not m.startswith(s.folder)}


def test_a_pass_stands_in_the_folder_of_its_kind_under_its_name() -> None:
    for name in registry.names():
        found = registry.lookup(name)
        assert found is not None
        folder, *inner, file = found.__module__.removeprefix("qcompile.passes.").split(".")
        assert file == name.replace("-", "_") and len(inner) <= 1, f"{name} stands in {found.__module__}"
        assert found.kind is FOLDERS[folder], f"{name} is {found.kind}, and stands in {folder}/"


def test_files_beside_passes_are_passes() -> None:
    """Helpers of one pass stand in its folder; what several passes share is a public room."""
    passes = {found.__module__ for name in registry.names() if (found := registry.lookup(name)) is not None}
    for source in SOURCES.values():
        folder, _, file = source.name.removeprefix("qcompile.passes.").rpartition(".")
        assert source.room != "passes" or source.is_package or folder not in FOLDERS or source.name in passes, source.path
        if source.is_package and folder in FOLDERS:
            assert any(p.startswith(f"{source.name}.") for p in passes), f"{source.path}: the folder {file} holds no pass"


def test_no_pass_imports_another_pass() -> None:
    def home(module: str) -> str:
        """The file of a pass, or its folder if it has one."""
        return ".".join(module.split(".")[:4])

    inner = {(s, m) for s, m, _ in ours() if s.room == "passes" and inside(m, ["passes"])}
    assert not {f"{s.path}: {m}" for s, m in inner if home(m) != home(s.name) or home(m) not in SOURCES}


def test_only_targets_compare_target_names() -> None:
    names = {*TARGETS, "openvino"}
    wrong = {
        f"{s.path}:{node.lineno}: {ast.unparse(node)}"
        for s in SOURCES.values()
        for node in ast.walk(s.tree)
        if s.room != "target" and isinstance(node, ast.Compare) and names & {*_words(node)} and ".domain" not in ast.unparse(node)
    }
    assert not wrong


def _words(node: ast.Compare) -> Iterator[str]:
    return (c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str))


def test_heavy_packages_stay_in_their_rooms() -> None:
    wrong = set[str]()
    for source in SOURCES.values():
        tops = {module.split(".")[0] for module, _ in source.imports}
        assert "passes" not in tops, f"{source.path}: import qcompile.passes, never the top-level folder"
        wrong |= {f"{source.path}: {top}" for top in tops if top in HEAVY and source.room not in HEAVY[top]}
    assert not wrong


def test_files_are_short_enough_to_read() -> None:
    assert not {str(s.path) for s in SOURCES.values() if len(s.text.splitlines()) >= 400}


def test_nothing_evaluates_or_unpickles() -> None:
    for source in SOURCES.values():
        used = {call.split(".")[0] for call in source.calls()} | {module.split(".")[0] for module, _ in source.imports}
        assert not NO_CODE_FROM_DATA & used, source.path


def test_onnx_files_are_opened_in_one_room() -> None:
    """`onnx.load` follows external data out of the folder and says nothing of a file that ends early; `ir` does not."""
    wrong = {str(s.path) for s in SOURCES.values() if s.room != "ir" and {"onnx.load", "onnx.load_model"} & s.calls()}
    assert not wrong
