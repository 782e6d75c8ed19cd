"""The rooms: what may import what, what a wheel holds, what stands at the top level."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("agents", "envs", "plasticity")
SIMULATORS = {"mujoco", "ale_py", "pybullet"}
LIGHT = (  # checking a command imports neither torch nor a simulator
    "agents/__init__.py", "agents/cli.py", "agents/config.py", "agents/settings.py",
    "agents/options.py", "agents/parse.py", "agents/presets.py", "agents/atari_presets.py",
    "agents/listing.py",
    "agents/run.py", "envs/__init__.py", "envs/specs.py", "envs/schedules.py", "envs/params.py",
    "envs/atari_games.py",
    "plasticity/__init__.py", "plasticity/registry.py", "plasticity/value_registry.py",
)  # fmt: skip


def imports_of(path: Path, nested: bool) -> set[str]:
    """Modules that a file imports at its top level, or anywhere; not under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(nodes) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            elif nested or not isinstance(node, ast.FunctionDef | ast.ClassDef):
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(path.read_text()).body)
    return found


def roots(modules: set[str]) -> set[str]:
    return {m.split(".")[0] for m in modules}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


def test_import_directions():
    for path in files("plasticity"):
        modules = imports_of(path, nested=True)
        foreign = roots(modules) - set(sys.stdlib_module_names) - {"torch", "numpy", "perennial"}
        allowed = {"stable_baselines3", "gymnasium"} if path.name.startswith("sb3") else set()
        allowed |= {"numba"} if path.name == "kernels.py" else set()
        assert foreign <= allowed, path.name
        assert not any(m.startswith(("perennial.agents", "perennial.envs")) for m in modules), path
    for path in files("envs"):
        modules = imports_of(path, nested=True)
        assert "torch" not in roots(modules), path.name
        assert not any(m.startswith(("perennial.agents", "perennial.plasticity")) for m in modules)


def test_checking_a_command_imports_no_torch():
    for name in LIGHT:
        assert not roots(imports_of(ROOT / name, nested=False)) & {"torch", *SIMULATORS}, name
    code = (
        "import sys, perennial.agents.cli, perennial.envs, perennial.plasticity\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"torch", "numba", "stable_baselines3", *SIMULATORS} & set(loaded.split())


def test_no_file_outgrows_its_subject():
    for package in PACKAGES:
        for path in files(package):
            assert len(path.read_text().splitlines()) <= 400, path
            assert path.name != "utils.py"


def test_top_level_is_fixed():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked}
    fixed = {
        "README.md",
        "pyproject.toml",
        *PACKAGES,
        "runs",
        "tests",
        ".ci",
        "constraints.txt",
        "LICENSE",
    }
    assert top == fixed | {".gitignore", ".typing"}


def test_packages_are_the_folders_and_the_wheel_holds_only_them(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == {f"perennial.{p}" for p in PACKAGES}
    source = tmp_path / "source"  # a build leaves files behind
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"perennial"}
    for package in PACKAGES:
        inside = {n.split("/")[2] for n in names if n.startswith(f"perennial/{package}/")}
        assert inside == {p.name for p in files(package)} | {"py.typed"}


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert 'pip install -c constraints.txt -e ".[dev]" && pytest -n 2' in readme
    assert 'pip install --quiet -c constraints.txt -e ".[dev]"' in ci and "\npytest -n 2" in ci


def test_constraints_pin_every_dependency():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in wanted:
        name = requirement.split(">")[0].split("[")[0].split("=")[0].lower().replace("_", "-")
        assert name in pinned, name


def test_readme_lists_every_method_and_metric():
    from perennial.plasticity.registry import METHODS, METRICS

    readme = (ROOT / "README.md").read_text()
    for name, entry in METHODS.items():
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
        assert entry.paper in row and all(f"{parameter}=" in row for parameter in entry.params)
    for name in METRICS:
        assert f"| `{name}` |" in readme, name
