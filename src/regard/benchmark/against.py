"""An older commit beside the present one: a throw-away worktree with its own kernels, and a process that runs them.

Both sides run in processes of the same kind, so that neither has the caller's threads and caches. Their runs are
interleaved; each measures its own, so what passes between the processes is no part of it. Their threads sleep at once
when idle (OMP_WAIT_POLICY=passive): by default they would spin for a while and take the cores from the other side.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from regard.benchmark.timing import Ratio, Timing, interleave

__all__ = ["Against", "AgainstError", "commit_of", "worktree"]

_SOURCE = Path(__file__).resolve().parents[2]  # `src` in a checkout
_WORKER = Path(__file__).with_name("_against.py")
_LIBRARY = Path("src/regard/_C.so")
_KERNELS = ("src/regard/csrc", "setup.py")


class AgainstError(ValueError):
    """A commit that cannot be compared with: its message says why."""


def commit_of(reference: str) -> tuple[Path, str]:
    """The checkout's root and the full name of the commit.

    Raises:
        AgainstError: regard does not run from a checkout of its own, git is missing, or the commit is unknown.
    """
    root = _SOURCE.parent
    if _SOURCE.name != "src" or not (root / ".git").exists():
        raise AgainstError("regard runs from no git checkout, so there is no other commit of it")
    try:
        return root, _git(root, "rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}")
    except FileNotFoundError:
        raise AgainstError("git is not installed") from None
    except subprocess.CalledProcessError:
        raise AgainstError(f"{reference!r} is no commit of {root.name}") from None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(root: Path, commit: str, say: Callable[[str], None] = lambda text: None) -> Iterator[Path]:
    """A worktree of the commit with its kernels built, removed on every way out.

    The kernels are the present ones if nothing that they are made of differs.

    Raises:
        AgainstError: the worktree cannot be made. That kernels cannot be built is said; the PyTorch path then runs.
    """
    folder = Path(tempfile.mkdtemp(prefix="regard-against-"))
    tree = folder / "checkout"
    try:
        try:
            _git(root, "worktree", "add", "--detach", str(tree), commit)
        except subprocess.CalledProcessError as error:
            raise AgainstError(f"git worktree: {error.stderr.strip()}") from None
        _provide_kernels(root, tree, commit, folder, say)
        yield tree
    finally:
        with _uninterrupted():
            subprocess.run(
                ["git", "worktree", "remove", "--force", "--force", str(tree)],
                cwd=root,
                capture_output=True,
                check=False,
            )
            shutil.rmtree(folder, ignore_errors=True)


def _provide_kernels(root: Path, tree: Path, commit: str, folder: Path, say: Callable[[str], None]) -> None:
    same = subprocess.run(["git", "diff", "--quiet", commit, "--", *_KERNELS], cwd=root, check=False).returncode == 0
    if same and (root / _LIBRARY).exists():
        shutil.copy2(root / _LIBRARY, tree / _LIBRARY)
        return
    say(f"building the kernels of {commit[:12]}")
    build = ["setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    with tempfile.TemporaryFile("w+") as said:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the compilers, too.
        process = subprocess.Popen(
            [sys.executable, *build], cwd=tree, stdout=said, stderr=said, start_new_session=os.name == "posix"
        )
        try:
            process.wait()
        finally:
            _end(process)
        said.seek(0)
        lines = said.read().strip().splitlines()
    built = folder / "lib" / "regard" / _LIBRARY.name
    if process.returncode or not built.exists():
        reason = lines[-1] if lines else "no reason given"
        say(f"the kernels of {commit[:12]} cannot be built ({reason}); its PyTorch path runs")
        return
    shutil.copy2(built, tree / _LIBRARY)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is over: what must be removed is removed."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, which alone is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(process: "subprocess.Popen[Any]") -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()


class _Side:
    """One checkout's process. Called by `interleave`, it tells the seconds that it measured itself."""

    def __init__(self, source: Path) -> None:
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=os.name == "posix",
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises AgainstError if the other side has a problem, or is gone."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the process was started without pipes")
        line = ""
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        if not line:
            raise AgainstError(f"its process died with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "problem" in answer:
            raise AgainstError(answer["problem"])
        return answer

    def clock(self) -> float:
        seconds: float = self.ask()["seconds"]
        return seconds

    def __call__(self) -> float:
        return self.clock()

    def end(self) -> None:
        _end(self._process)


class Against:
    """The operators of another checkout beside those of this one.

    Args:
        source: the other checkout's `src`.
        name: what tables call it.
    """

    def __init__(self, source: Path, name: str) -> None:
        self.name = name
        self._sides: list[_Side] = []
        self._folder = tempfile.TemporaryDirectory(prefix="regard-against-")
        try:
            for place in (_SOURCE, source):
                self._sides.append(_Side(place))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with _uninterrupted():
            for side in self._sides:
                side.end()
            self._folder.cleanup()

    def measure(
        self, operator: str, options: dict[str, Any], tensors: dict[str, Any], direction: str, seconds: float
    ) -> tuple[Timing, Ratio]:
        """The other checkout's timing, and how many times longer it took than this one's operator in the same rounds.

        Args:
            tensors: the operator's, by name, on the processor; with gradients also `grad_output`.
            options: plain values.

        Raises:
            AgainstError: one of the sides cannot run it.
        """
        path = Path(self._folder.name) / "tensors.pt"
        torch.save(tensors, path)
        load = {
            "operator": operator,
            "options": options,
            "tensors": str(path),
            "direction": direction,
            "threads": torch.get_num_threads(),
        }
        for side in self._sides:
            side.ask(load=load)
        sides = dict(zip(("this", "other"), self._sides, strict=True))
        timings = interleave(sides, budget_seconds=seconds, min_rounds=3, max_rounds=300)
        return timings["other"], timings["this"].ratio(timings["other"])
