"""The watch itself sees what it is there for, and the package has no way to what it forbids."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

import eightgig
from tests.security.watch import Watch

_SOURCES = {
    path: path.read_text(encoding="utf-8")
    for path in sorted(Path(eightgig.__file__).parent.rglob("*.py"))
}
_NODES = {
    path: [
        n
        for n in ast.walk(ast.parse(text))
        if isinstance(n, (ast.Call, ast.Import, ast.ImportFrom))
    ]
    for path, text in _SOURCES.items()
}
_FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "numpy.load", "np.load",
    "np.save", "numpy.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system",
    "os.popen", "torch.hub.load", "torch.jit.load", "joblib.load", "pandas.read_pickle",
    "tarfile.open", "shutil.unpack_archive", "zipfile.ZipFile",
}  # fmt: skip
_FORBIDDEN_IMPORTS = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "zipfile",
    "gguf.gguf_reader", "http.server", "socketserver", "xml",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(_FORBIDDEN_CALLS))
def test_the_package_never_calls(name: str) -> None:
    found = [
        f"{path.name}:{node.lineno}"
        for path, nodes in _NODES.items()
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name
    ]
    assert found == []


@pytest.mark.parametrize("name", sorted(_FORBIDDEN_IMPORTS))
def test_the_package_never_imports(name: str) -> None:
    found = []
    for path, nodes in _NODES.items():
        for node in nodes:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(other == name or other.startswith(name + ".") for other in names):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_gguf_is_read_only_where_what_was_just_written_is_compared() -> None:
    assert [path.name for path, text in _SOURCES.items() if "GGUFReader" in text] == [
        "weight_check.py"
    ]


@pytest.mark.parametrize("word", ["trust_remote_code=True", "shell=True", "weights_only=False",
                                  "allow_pickle=True"])  # fmt: skip
def test_the_package_never_says(word: str) -> None:
    assert [path.name for path, text in _SOURCES.items() if word in text] == []


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return len, ("abc",)


def test_the_watch_sees_a_pickle(watch: Watch) -> None:
    pickle.loads(pickle.dumps(_Evil()))
    assert any("pickle.find_class" in event for event in watch.events)
    watch.events.clear()


def test_the_watch_sees_a_secret_read_and_a_file_written(
    watch: Watch, outside: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside.read_text()
    (tmp_path_factory.mktemp("elsewhere") / "x").write_text("y")
    exec(compile("1", "/tmp/somewhere/evil.py", "exec"))  # what an import of such a file does
    kinds = [event.split()[0] for event in watch.events]
    assert kinds == ["open", "write", "exec"]
    watch.events.clear()
