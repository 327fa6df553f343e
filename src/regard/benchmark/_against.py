"""The process of regard.benchmark.against that runs one checkout's operator: requests in JSON on stdin, answers on
stdout, a line each.

It is run as a file of the present checkout under the path of another one, so of regard it imports `regard.ops` alone.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    source = str(Path(sys.argv[1]).resolve())
    sys.path.insert(0, source)
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an operator prints must not mix with the answers
    run: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "load" in request:
                run = _loaded(source, **request["load"])
            else:
                begun = time.perf_counter()
                result = run()
                answer = {"seconds": time.perf_counter() - begun}
                del result
        except Exception as error:  # whatever another version raises belongs into its answer
            answer = {"problem": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=told, flush=True)


def _loaded(source: str, operator: str, options: dict[str, Any], tensors: str, direction: str, threads: int) -> Any:
    """A callable without arguments that runs the operator once."""
    import torch

    import regard.ops

    if not str(Path(regard.ops.__file__).resolve()).startswith(source):
        raise ImportError(f"regard comes from {regard.ops.__file__}")
    torch.set_num_threads(threads)
    function = getattr(regard.ops, operator, None)
    if function is None:
        raise LookupError(f"regard.ops has no {operator} there")
    given = torch.load(tensors, weights_only=True)
    gradient = given.pop("grad_output", None)
    if direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(**given, **options)

        return forward
    leaves = [given[name].requires_grad_() for name in ("query", "key", "value")]
    return lambda: torch.autograd.grad(function(**given, **options), leaves, gradient)


if __name__ == "__main__":
    main()
