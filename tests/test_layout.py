"""The rooms of the house: who may import whom, no circles, and lines that hold one thought.

Imports are read with `ast`; nothing is run for them.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a room imports itself and the rooms before it. "core" are the files in cfgsafe/ itself.
ROOMS = ("kernels", "core", "pii", "measure", "blue", "report", "red", "bench", "demo", "study", "scripts")
SCRIPTS = ("train", "infer", "eval")
BARE_CORE = (
    "settings",
    "config",
    "weights",
    "llama",
    "tokenizer",
    "checkpoint",
    "patterns",
    "lora_config",
    "lora",
    "losses",
    "guidance",
    "decode",
    "lockstep",
    "logprobs",
)
BARE_PACKAGES = {"torch", "numpy", "safetensors", "tokenizers", "cfgsafe"}
LAZY_PACKAGES = {"triton", "jinja2"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def product_files() -> dict[str, Path]:
    """Module name -> file, kernels under the name they are imported by."""
    files = {name: ROOT / f"{name}.py" for name in SCRIPTS}
    for path in sorted((ROOT / "cfgsafe").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        files[name.removesuffix(".__init__")] = path
    for path in sorted((ROOT / "kernels").glob("*.py")):
        files[f"cfgsafe.kernels.{path.stem}"] = path
    return files


FILES = product_files()


def room_of(module: str) -> str:
    """
    >>> room_of("cfgsafe.measure.leak"), room_of("cfgsafe.llama"), room_of("train")
    ('measure', 'core', 'scripts')
    """
    if module in SCRIPTS:
        return "scripts"
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and parts[1] in ROOMS) else "core"


def imported_names(node: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """Absolute names that an import of `module` may mean: "a.b" and "a.b.c" for `from a.b import c`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    source = node.module or ""
    if node.level:
        package = module.split(".")[: -node.level]
        source = ".".join([*package, source] if source else package)
    return [source, *(f"{source}.{alias.name}" for alias in node.names)]


def imports(module: str, *, only_at_import: bool = False) -> set[str]:
    """What a module imports, inside functions too unless `only_at_import`."""
    tree = ast.parse(FILES[module].read_text())
    found = set()
    for node in tree.body if only_at_import else ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(imported_names(node, module))
    return found


def product_imports(module: str) -> set[str]:
    """The modules of the project that a module imports; not the packages that merely lead to them."""
    named = {name for name in imports(module) if name in FILES and name != module}
    return {name for name in named if not any(other.startswith(f"{name}.") for other in named)}


@pytest.mark.parametrize("module", FILES)
def test_no_room_imports_a_higher_one(module):
    highest = ROOMS.index(room_of(module))
    above = [name for name in product_imports(module) if ROOMS.index(room_of(name)) > highest]
    assert not above, f"{module} imports {above}"


def test_kernels_import_nothing_of_the_rest():
    for module in FILES:
        if room_of(module) == "kernels":
            text = FILES[module].read_text()
            assert "cfgsafe" not in {name.split(".")[0] for name in absolute_imports(text)}, module


def absolute_imports(text: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    return names


def test_no_module_imports_one_that_imports_it():
    graph = {module: product_imports(module) for module in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", [*(f"cfgsafe.{name}" for name in BARE_CORE), "cfgsafe.kernels.reference"])
def test_the_core_runs_on_a_bare_gpu_machine(name):
    """It imports only torch, numpy, safetensors and tokenizers; triton and jinja2 inside functions."""
    packages = {source.split(".")[0] for source in imports(name, only_at_import=True)}
    assert packages <= BARE_PACKAGES | set(sys.stdlib_module_names)
    inside = {source.split(".")[0] for source in imports(name)}
    assert inside <= BARE_PACKAGES | LAZY_PACKAGES | set(sys.stdlib_module_names)


def nested_comprehensions(tree: ast.AST) -> int:
    """Comprehensions with more than one `for`, or with another comprehension inside."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            inside = [
                part for part in ast.walk(node) if isinstance(part, COMPREHENSIONS) and part is not node
            ]
            count += len(node.generators) > 1 or bool(inside)
    return count


def test_one_thought_a_line():
    """At most 1 nested comprehension a 1,000 lines, 5 % of lines over 100 characters, 420 lines a file."""
    nested, long = 0, 0
    lines = []
    for path in FILES.values():
        text = path.read_text()
        nested += nested_comprehensions(ast.parse(text))
        lines += text.splitlines()
        assert len(text.splitlines()) <= 420, path
    long = sum(len(line) > 100 for line in lines)
    assert 1000 * nested <= len(lines)
    assert long <= 0.05 * len(lines)


def test_another_package_named_kernels_is_not_hidden(tmp_path, monkeypatch):
    """Hugging Face's package, which transformers looks for, wins over our folder even in the checkout."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("THEIRS = True\n")
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    import kernels

    assert kernels.THEIRS
    monkeypatch.delitem(sys.modules, "kernels")
    from cfgsafe.kernels import reference

    assert Path(reference.__file__).resolve() == ROOT / "kernels" / "reference.py"
