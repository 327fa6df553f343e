"""Another commit beside the present one: throw-away worktrees, and processes that are asked in turn."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import regard
from regard.benchmark import against
from regard.benchmark.against import Against, AgainstError, commit_of, worktree

SOURCE = Path(regard.__file__).resolve().parents[1]
OPTIONS = {"topk": 3}


def tensors(gradient: bool = False) -> dict[str, torch.Tensor]:
    names = ["query", "key", "value", *(["grad_output"] if gradient else [])]
    return {name: torch.randn(1, 2, 16, 8) for name in names}


def git(root: Path, *arguments: str) -> str:
    named = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *named, *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository of two commits: without k-NN attention, then as regard is here, kernels included."""
    root = tmp_path / "regard"
    shutil.copytree(SOURCE / "regard", root / "src" / "regard", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (root / "setup.py").write_text("raise SystemExit('no compiler here')\n")
    (root / ".gitignore").write_text("*.so\n__pycache__/\n")
    git(root, "init", "-q", "-b", "main")
    ops = root / "src" / "regard" / "ops" / "__init__.py"
    text = ops.read_text()
    ops.write_text(text.replace('    "knn_attention",\n', "") + "\ndel knn_attention\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "old")
    ops.write_text(text)
    git(root, "commit", "-q", "-am", "new")
    return root


def test_both_sides_run_the_operator_and_are_timed():
    with Against(SOURCE, "at HEAD") as sides:
        for direction, gradient in (("forward", False), ("forward+backward", True)):
            timing, slower = sides.measure("knn_attention", OPTIONS, tensors(gradient), direction, 0.1)
            assert timing.repeats >= 1 and timing.median > 0 and slower.median > 0
        processes = [side._process for side in sides._sides]
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


def test_what_the_other_side_cannot_do_is_said_and_the_next_still_runs(checkout):
    with worktree(checkout, "HEAD~1") as tree, Against(tree / "src", "at HEAD~1") as sides:
        with pytest.raises(AgainstError, match="has no knn_attention there"):
            sides.measure("knn_attention", OPTIONS, tensors(), "forward", 0.1)
        given = {"x": torch.randn(1, 30, 4)}
        timing, _ = sides.measure("kmeans_clusters", {"num_clusters": 3}, given, "forward", 0.1)
        assert timing.repeats >= 1
        with pytest.raises(AgainstError, match="num_clusters"):
            sides.measure("kmeans_clusters", {"num_clusters": 31}, given, "forward", 0.1)


def test_a_worktree_is_removed_on_every_way_out(checkout):
    said = []
    with worktree(checkout, "HEAD~1", said.append) as tree:
        assert (tree / "src" / "regard" / "__init__.py").exists()
        library = checkout / "src" / "regard" / "_C.so"
        assert (tree / "src" / "regard" / "_C.so").exists() == library.exists()  # nothing it is made of differs
        assert len(git(checkout, "worktree", "list").splitlines()) == 2
    assert not tree.parent.exists() and len(git(checkout, "worktree", "list").splitlines()) == 1
    with pytest.raises(KeyboardInterrupt), worktree(checkout, "HEAD") as tree:
        raise KeyboardInterrupt
    assert not tree.parent.exists() and len(git(checkout, "worktree", "list").splitlines()) == 1
    with pytest.raises(AgainstError, match="git worktree"), worktree(checkout, "nothing"):
        pass


def test_kernels_that_cannot_be_built_are_said(checkout):
    (checkout / "src" / "regard" / "csrc" / "knn.h").write_text("other\n")
    said = []
    with worktree(checkout, "HEAD", said.append) as tree:
        assert not (tree / "src" / "regard" / "_C.so").exists()
    assert "building the kernels" in said[0] and "cannot be built (no compiler here)" in said[1]


def test_commits_are_looked_up_in_regards_own_checkout(monkeypatch, checkout, tmp_path):
    monkeypatch.setattr(against, "_SOURCE", checkout / "src")
    assert commit_of("HEAD~1") == (checkout, git(checkout, "rev-parse", "HEAD~1"))
    with pytest.raises(AgainstError, match="'nothing' is no commit"):
        commit_of("nothing")
    monkeypatch.setattr(against, "_SOURCE", tmp_path / "site-packages")
    with pytest.raises(AgainstError, match="no git checkout"):
        commit_of("HEAD")


@pytest.mark.slow
def test_ctrl_c_removes_the_worktree_and_ends_the_processes(checkout):
    command = [sys.executable, "-m", "regard", "bench", "knn", "--quick", "--no-memory", "--against", "HEAD~1"]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(git(checkout, "worktree", "list").splitlines()) == 1:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        tree = Path(git(checkout, "worktree", "list").splitlines()[1].split()[0])
        time.sleep(1.5)  # in the middle of things
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "the same command resumes" in errors
    assert not tree.parent.exists() and len(git(checkout, "worktree", "list").splitlines()) == 1
