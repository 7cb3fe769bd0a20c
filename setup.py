"""Builds csrc where that is possible at install time; everything else about the package is in pyproject.toml.

An isolated or fresh environment has no torch yet: then the sources travel along and the first import compiles them.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("st_fast_build", HERE / "st_fast" / "kernels" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class BuildWithCsrc(build_py):
    """The Python files, csrc and the recipes, then the compiled file or one line that says why there is none."""

    def run(self):
        super().run()
        package = HERE / "st_fast" if self.editable_mode else Path(self.build_lib) / "st_fast"
        if not self.editable_mode:
            shutil.copytree(HERE / "csrc", package / "csrc", dirs_exist_ok=True)
            for recipe in (HERE / "recipes").glob("*.toml"):
                (package / "recipes").mkdir(exist_ok=True)
                shutil.copy2(recipe, package / "recipes")
        for kind in build.KINDS:
            try:
                print(f"csrc ({kind}): {build.build(kind, package)}")
            except build.BuildError as error:
                print(f"csrc ({kind}): not built at install time, {error}; the first import tries again")


class StableWheel(bdist_wheel):
    """With a compiled file inside: any Python 3, this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class MaybeBinary(Distribution):
    """Platform-specific when csrc can be compiled here."""

    def has_ext_modules(self):
        try:
            return bool(build.torch_dir())
        except build.BuildError:
            return False


setup(distclass=MaybeBinary, cmdclass={"build_py": BuildWithCsrc, "bdist_wheel": StableWheel})
