"""The import law: which part of longtake may know which other, and what a bare machine needs."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "longtake"

MAY_IMPORT = {
    "files": "",
    "flow": "",
    "media": "files",
    "parallel": "",
    "attention": "",
    "memory": "attention",
    "models": "attention memory",
    "generation": "files flow memory models",
    "toy": "models",
    "distillation": "files flow attention memory models generation parallel",
    "evaluation": "files flow parallel attention memory models generation media toy",
    "serving": "files generation media",
    "recipes": "flow media parallel attention memory models generation toy distillation evaluation",
    "training": "files flow media parallel attention memory models generation toy distillation evaluation recipes",
    "batch": "media parallel models generation",
    "explain": "memory models generation evaluation recipes",
    "plan": "attention memory models generation parallel toy recipes",
    "doctor": "media models evaluation recipes",
    "cli": (
        "files flow media parallel attention memory models generation toy distillation evaluation serving training "
        "explain plan batch doctor recipes"
    ),
}
ENGINE_AND_TRAINING = "files flow attention memory models generation distillation parallel recipes toy training"
BARE = {"torch", "numpy", "einops", "safetensors", "pyyaml"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(source: str) -> Iterator[tuple[int, str]]:
    """Line and part of longtake for each import of ours, wherever in the file; the bare package counts as __init__."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = ["relative"] if node.level else [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, part = f"{name}.__init__".split(".")[:2]
            if package == "relative":
                yield node.lineno, "something relative, which this law cannot judge"
            elif package == "longtake":
                yield node.lineno, part


def offences(part: str, source: str) -> list[tuple[int, str]]:
    allowed = {part, *MAY_IMPORT[part].split(), "__version__"}  # a name of the package, and no part
    return [(line, other) for line, other in imported_parts(source) if other not in allowed]


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_parts_import_only_what_the_law_allows():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {part_of(path)} may not import {other}"
        for path in sources()
        for line, other in offences(part_of(path), path.read_text())
    ]
    assert not found, "\n".join(found)


def test_every_part_has_a_row():
    assert {part_of(path) for path in sources()} <= MAY_IMPORT.keys()


@pytest.mark.parametrize(
    "planted",
    [
        "from longtake.models import wan",
        "from longtake import models",
        "import longtake.models.wan as network",
        "import longtake",
        "from . import dense",
        "def late():\n    import longtake.models",
        "if TYPE_CHECKING:\n    from longtake.models.wan import WanTransformer",
    ],
)
def test_a_planted_offence_is_found(planted):
    assert offences("attention", f"import torch\n{planted}")


def test_the_law_has_no_cycle():
    left = {part: set(allowed.split()) for part, allowed in MAY_IMPORT.items()}
    while left:
        free = [part for part, needs in left.items() if not needs & left.keys()]
        assert free, f"cycle among {sorted(left)}"
        for part in free:
            del left[part]


WITHOUT = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine", name=name)

sys.meta_path.insert(0, Absent())
for module in {modules}:
    importlib.import_module(module)
"""


def test_engine_and_training_need_no_more_than_a_bare_gpu_machine_has():
    sought = [path for path in sources() if part_of(path) in ENGINE_AND_TRAINING.split()]
    modules = [module_name(path) for path in sought if not path.stem.endswith("_triton")]  # kernels, imported on a GPU
    program = WITHOUT.format(missing=sorted(optional_modules()), modules=modules)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def optional_modules() -> set[str]:
    """Every distribution that pyproject.toml names, but for what a bare machine has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in wanted}
    return {name.replace("-", "_") for name in names - BARE - {project["name"]}}  # an extra may name another of ours


def test_the_public_face_waits_for_torch():
    program = "import sys, longtake; assert 'torch' not in sys.modules; longtake.Engine; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_there():
    import longtake

    assert all(getattr(longtake, name) is not None for name in longtake.__all__)
    with pytest.raises(AttributeError, match="lode"):
        _ = longtake.lode
