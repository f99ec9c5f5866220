"""Who may import whom: a room imports only downward."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxcompute"

# room -> the rooms it may import; a package stands for its modules, and errors, locks and stops may be imported by all
MAY = {
    "metrics": set(),
    "core": {"config", "metrics"},
    "config": set(),
    "step": {"core", "metrics"},
    "sharding": {"core"},
    "log": {"core", "metrics"},
    "checkpoint": {"core", "metrics"},
    "cache": set(),
    "distributed": set(),
    "flops": set(),
    "train": {"core", "step", "sharding", "checkpoint", "distributed", "flops", "log", "metrics"},
    "replay": {"train", "core", "step", "sharding", "checkpoint", "log"},
    "verify": {"checkpoint", "log"},
    "losses": {"core", "metrics"},
    "optim": {"core", "metrics"},
    "models": {"models"},
    "data": set(),
    "data.order": set(),
    "data.sources": {"data.order"},
    "data.stream": {"data.order", "data.sources"},
    "data.augment": {"core", "metrics"},
    "data.memory": {"core", "data.order", "data.augment"},
    "sweep": {"config", "log", "sweep"},
    "compute": {"train", "core", "distributed", "flops", "step", "sharding", "log", "metrics", "compute"},
    "interactive": {"train", "core", "step", "sharding", "checkpoint", "log", "metrics"},
    "errors": set(),
    "locks": set(),
    "stops": set(),
    "": set(),
}
EXPERIMENTS = {"core", "config", "step", "metrics", "models", "data", "losses", "optim", "sharding"}
FREE_OF_JAX = ["cache.py", "config.py", "locks.py", "log.py", "stops.py", "data/order.py", "data/sources.py"]
FREE_OF_JAX += ["data/stream.py", "sweep/grid.py", "sweep/slurm.py", "compute/doctor.py"]
LAUNCH = {"cache", "config", "data", "train", "distributed", "sharding", "replay", "verify", "log"}
LAUNCH |= {"sweep", "compute", "report", "deploy"}


def rooms(file: Path) -> set[str]:
    """The jaxcompute modules that a file imports, as dotted names below the package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(file.relative_to(ROOT).parts[: -node.level])
            names = [f"{package}.{node.module or alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "jaxcompute" or name.startswith("jaxcompute."):
                parts = name.split(".")[1:]
                while parts and not PACKAGE.joinpath(*parts).with_suffix(".py").exists():
                    if PACKAGE.joinpath(*parts).is_dir():
                        break
                    parts.pop()
                found.add(".".join(parts))
    return found - {"", "errors", "locks", "stops"}


def allowed(name: str, may: set[str]) -> bool:
    return name in may or name.split(".")[0] in may


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_downward(file: Path):
    name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    may = MAY.get(name, MAY.get(name.split(".")[0]))
    assert may is not None, f"{name} is a new room: say in MAY whom it may import"
    upward = {other for other in rooms(file) if not allowed(other, may)}
    assert not upward, f"{name} imports {upward}"


def test_experiments_and_launch_import_what_they_may():
    for file in (ROOT / "experiments").glob("*.py"):
        assert all(allowed(name, EXPERIMENTS) for name in rooms(file)), file
    assert all(allowed(name, LAUNCH) for name in rooms(ROOT / "launch.py"))


@pytest.mark.parametrize("file", FREE_OF_JAX)
def test_these_import_no_jax_at_their_head(file: str):
    for node in ast.parse((PACKAGE / file).read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] in ("jax", "flax", "optax", "tensorflow_datasets") for name in names)


@pytest.mark.parametrize("file", sorted((PACKAGE / "models").glob("*.py")), ids=lambda file: file.name)
def test_models_know_nothing_of_the_house(file: Path):
    heads = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            heads |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            heads.add(str(node.module).split(".")[0])
    assert heads <= {"collections", "functools", "math", "typing", "flax", "jax"}
