"""Everything about the package is in pyproject.toml; the C++ extension is built here.

The CPU kernels are compiled once for each instruction set, and the best one is chosen when they are
loaded. Without a C++ compiler the installation goes on without them.
"""

from __future__ import annotations

import itertools
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# Each is compiled once per instruction set.
SOURCES = ("attention", "elementwise", "layers", "linear", "peak", "sampling")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Portable first: of an inline function of the standard library that several objects hold, the linker keeps
# the first, and that one has to run on every CPU.
INSTRUCTION_SETS = {"portable": []}
if IS_X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    vnni = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
    INSTRUCTION_SETS["avx512"] = [*INSTRUCTION_SETS["avx2"], *vnni]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # and the next: of GCC 12's own AVX-512 header
    "-Wno-uninitialized",
    "-Wno-unknown-pragmas",
    "-Wno-unknown-warning-option",  # clang doesn't know all of these
]
CSRC = Path("kernels/csrc")
MAX_COMPILERS = 4  # at once: each takes some hundred MiB, and a container may see many cores and have little


class BuildKernels(build_ext):
    """Compile each source file several times, on several cores, then link all of it into one module."""

    def build_extension(self, ext: Extension) -> None:
        openmp = ["-fopenmp"] if self._has_openmp() else []
        compiler = self.compiler

        def compile_one(name: str, source: str) -> list[str]:
            built: list[str] = compiler.compile(
                [str(CSRC / f"{source}.cpp")],
                output_dir=f"{self.build_temp}/{name}",
                macros=[("ISA", name)],
                extra_postargs=[*FLAGS, *INSTRUCTION_SETS[name], *openmp],
                depends=ext.depends,
            )
            return built

        for name in INSTRUCTION_SETS:  # before several threads make the same folders
            Path(self.build_temp, name, CSRC).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_COMPILERS)) as threads:
            built = threads.map(compile_one, *zip(*itertools.product(INSTRUCTION_SETS, SOURCES), strict=True))
            objects = [*itertools.chain.from_iterable(built)]
        objects += compiler.compile(
            [str(CSRC / "module.cpp")],
            output_dir=self.build_temp,
            include_dirs=compiler.include_dirs,
            macros=[*ext.define_macros, *([("MINIVLLM_X86", "1")] if IS_X86 else [])],
            extra_postargs=FLAGS,
            depends=ext.depends,
        )
        # The module's OpenMP calls end up in the runtime that torch has loaded by then: the same pool.
        compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=openmp, target_lang="c++"
        )

    def _has_openmp(self) -> bool:
        """Apple's clang has none; one thread then does the work."""
        openmp = ["-fopenmp"]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=openmp)
                self.compiler.link_shared_object(
                    objects, str(Path(folder, "probe.so")), extra_postargs=openmp, target_lang="c++"
                )
            except (CompileError, LinkError):
                return False
        return True


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "minivllm_kernels._cpu",
            [f"{CSRC}/{source}.cpp" for source in (*SOURCES, "module")],
            depends=[str(header) for header in sorted(CSRC.glob("*.h"))],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            language="c++",
            optional=True,
        )
    ],
)
