"""AddressSanitizer and UndefinedBehaviorSanitizer over the C++ operator tests, with every instruction set here."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkouts import ROOT, run
from torch.utils import cpp_extension

from regard.ops import _library

COMPILER = os.environ.get("CXX") or shutil.which("c++") or ""
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1")
INSTRUCTION_SETS = ("plain", "avx2", "avx512")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("sanitizers"),  # one worker builds the kernels for all
    pytest.mark.skipif(not COMPILER or sys.platform != "linux", reason="needs a C++ compiler on Linux"),
]

# One write beyond an array, one signed overflow: what the sanitizers must stop, or this file proves nothing.
CANARY = r"""
#include <cstdint>
extern "C" void beyond(int64_t n) { volatile char* p = new char[n]; p[n] = 1; delete[] p; }
extern "C" int32_t overflow(int32_t n) { return n + 2147483647; }
"""

LOADED = """
import sys
from regard.ops._library import instruction_set, problem
print(instruction_set())
sys.exit(problem() or 0)
"""


def compile_library(sources: list[Path], target: Path, flags: list[str], libraries: list[str]) -> Path:
    """Compile the sources, two at a time, and link them."""

    def compile_one(source: Path) -> Path:
        made = target.with_name(source.name + ".o")
        run(COMPILER, "-c", "-fPIC", *flags, *SANITIZE, source, "-o", made)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    run(COMPILER, "-shared", *SANITIZE, *objects, "-o", target, *libraries)
    return target


@pytest.fixture(scope="module")
def environment():
    """What a process needs to load a sanitized library: the runtimes first, and no report of Python's leaks."""
    runtimes = [run(COMPILER, f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan", "stdc++")]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip(f"{COMPILER} has no sanitizer runtimes")
    return {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernels with sanitizers and scratch memory full of NaN; else as setup.py makes them, but for optimisation."""
    csrc = ROOT / "src" / "regard" / "csrc"
    includes = [f"-I{folder}" for folder in (csrc, *cpp_extension.include_paths())]
    flags = [*runpy.run_path(str(ROOT / "setup.py"))["COMPILE_FLAGS"], *includes, "-DREGARD_POISON"]
    libraries = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
    target = tmp_path_factory.mktemp("sanitized") / "kernels.so"
    return compile_library(sorted(csrc.glob("*.cpp")), target, flags, libraries)


@pytest.mark.parametrize(
    ("call", "report"),
    [("beyond(8)", "AddressSanitizer: heap-buffer-overflow"), ("overflow(1)", "runtime error: signed")],
)
def test_the_sanitizers_are_awake(tmp_path, environment, call, report):
    source = tmp_path / "canary.cpp"
    source.write_text(CANARY)
    library = compile_library([source], tmp_path / "canary.so", [], [])
    done = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r}).{call}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert report in done.stderr


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_operators_under_sanitizers(tmp_path, environment, kernels, instruction_set):
    best = _library.instruction_set()
    if best not in INSTRUCTION_SETS[INSTRUCTION_SETS.index(instruction_set) :]:
        pytest.skip(f"this machine has {best} only")
    chosen = {**environment, "REGARD_KERNELS": str(kernels), "REGARD_INSTRUCTION_SET": instruction_set}
    # pytest captures what a process prints, so the reports go into files
    chosen["ASAN_OPTIONS"] += f":log_path={tmp_path / 'report'}"
    chosen["UBSAN_OPTIONS"] += f":log_path={tmp_path / 'report'}"
    assert run(sys.executable, "-c", LOADED, cwd=ROOT, **chosen).split()[-1] == instruction_set
    # torch.compile's own compiler and tracing are not what is tested here
    tests = ("tests/ops", "-k", "not compile", "-p", "no:cacheprovider")
    try:
        said = run(sys.executable, "-m", "pytest", "-q", "-n0", *tests, cwd=ROOT, **chosen)
    except AssertionError as failure:
        reports = "\n".join(path.read_text(errors="replace")[:8000] for path in tmp_path.glob("report*"))
        raise AssertionError(f"{failure}\n{reports}") from None
    assert re.search(r"\d+ passed", said)
    assert not list(tmp_path.glob("report*"))
