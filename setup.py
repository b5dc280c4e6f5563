"""Put the packages of a wheel into `alexnet_train`; pyproject.toml has everything else about the build.

In a checkout, the folders of the repository are top-level packages: `from pipeline import Loader`. A wheel
must not install such names, because they belong to nobody: PyPI has other distributions that install
`trainer` or `tools`, and pip would overwrite the files of one with those of the other. So a wheel has
`alexnet_train.pipeline` and so on, and setup.py changes the import statements of its modules. It does not
change strings: a module that names another in a string takes the prefix from `pipeline.names` or from
`__package__`. An editable installation is a checkout, and keeps its names. Both have the package
`alexnet_train` itself, from the folder tools/package, for `python -m alexnet_train`.
"""

import ast
import re
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_py import build_py

ROOT = "alexnet_train"
FOLDERS = ("model", "pipeline", "tools", "trainer")
_IMPORT = re.compile(rf"^(\s*from )(?=(?:{'|'.join(FOLDERS)})(?:\.[\w.]+)? import\b)", re.MULTILINE)


def moved(name: str) -> str:
    """Return the name that a package or module of the repository has in a wheel."""
    return f"{ROOT}.{name}" if name.partition(".")[0] in FOLDERS else name


def with_moved_imports(source: str) -> str:
    """Return a module's source with changed imports. Raises ValueError if an import has another form."""
    source = _IMPORT.sub(rf"\1{ROOT}.", source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if moved(name) != name:
                raise ValueError(
                    f"line {node.lineno}: write `from {name} import …`, which setup.py can change"
                )
    return source


class MovingDistribution(Distribution):
    """What pyproject.toml describes, with moved packages unless the installation is editable."""

    packages: list[str]
    package_data: dict[str, list[str]]
    entry_points: dict[str, list[str]]
    ext_modules: list[Extension]

    def parse_config_files(self, *arguments, **options) -> None:
        super().parse_config_files(*arguments, **options)
        self.package_dir = {ROOT: "tools/package"}
        if "editable_wheel" in sys.argv:
            self.packages.append(ROOT)
            return
        self.package_dir |= {moved(name): name for name in FOLDERS}
        self.packages = [ROOT, *(moved(name) for name in self.packages)]
        self.package_data = {moved(name): patterns for name, patterns in self.package_data.items()}
        for module in self.ext_modules:
            module.name = moved(module.name)
        self.entry_points = {
            group: [re.sub(r"= *", f"= {ROOT}.", script, count=1) for script in scripts]
            for group, scripts in self.entry_points.items()
        }


class MovingBuild(build_py):
    """Change the imports of the modules that are copied for a wheel."""

    def build_module(self, module, module_file, package):
        target, copied = super().build_module(module, module_file, package)
        path = Path(target)
        try:
            path.write_text(with_moved_imports(path.read_text(encoding="utf-8")), encoding="utf-8")
        except ValueError as error:
            raise SystemExit(f"{module_file}: {error}") from None
        return target, copied


if __name__ == "__main__":  # tests import this module
    setup(distclass=MovingDistribution, cmdclass={"build_py": MovingBuild})
