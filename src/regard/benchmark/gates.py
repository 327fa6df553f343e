"""Correctness gates of operators other than k-NN attention; the rule is that of regard.benchmark.gate."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.benchmark.gate import Judgement, error_budget, largest_error
from regard.benchmark.peers import published_density_peaks
from regard.ops import density_peak_clusters, kmeans_clusters, only_backend
from regard.ops.clustering import density_peaks_reference
from regard.ops.multipole.api import OPERATOR as MULTIPOLE
from regard.ops.multipole.call import MultipoleCall, clusters_of_keys
from regard.ops.multipole.reference import multipole_attention_reference

__all__ = [
    "Findings",
    "check_density_peaks",
    "check_kernel",
    "check_kmeans",
    "check_multipole",
    "judge_attention",
]

_QUERIES = 256  # that are judged: float64 weights of all would not fit into memory at the sizes that matter
_ORDERS = 4  # in which eager's error is taken
_ROUNDINGS = 5  # of half a unit: a weight's exponential (a whole unit), total and quotient, its product with the value
_NAMES = ("output", "grad_query", "grad_key", "grad_value")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Findings:
    """What a gate found: errors beside their budgets, and what is wrong apart from those."""

    operator: str
    dtype: str
    judgements: tuple[Judgement, ...] = ()
    problems: tuple[str, ...] = ()
    asked: str = ""  # what was compared

    @property
    def passed(self) -> bool:
        return not self.problems and all(one.passed for one in self.judgements)

    def __str__(self) -> str:
        verdict = "green" if self.passed else "RED"
        told = [f"error of budget: {', '.join(map(str, self.judgements))}"] if self.judgements else []
        told = [self.asked, *told, *self.problems]
        return f"{self.operator} ({self.dtype}): {verdict}; {'; '.join(filter(None, told))}"


def judge_attention(
    own: Attend, exact: Attend, eager: Sequence[Attend], tensors: Sequence[Tensor], *, backward: bool, name: str = ""
) -> tuple[Judgement, ...]:
    """Judge an attention's output, and its gradients if asked, by the error budget.

    Args:
        own: query, key, value -> output, as measured.
        exact: the definition; it gets the tensors in float64.
        eager: the definition in plain PyTorch operations, in several orders of summation; they get the tensors as they
            are, and the worst error counts.
        tensors: query, key, value.
        name: set before the names of what is judged.
    """
    generator = torch.Generator().manual_seed(1)
    query, _, value = tensors
    gradient = torch.randn((*query.shape[:-1], value.shape[-1]), generator=generator).to(query.device, query.dtype)
    doubled, wide = [one.double() for one in tensors], gradient.double()
    right = _differentiate(exact, doubled, wide, backward)
    rough = [_differentiate(one, tensors, gradient, backward) for one in eager]
    found = _differentiate(own, tensors, gradient, backward)
    # Weights are not negative, so absolute values and gradients give the size of what outputs and gradients of values
    # sum, which may cancel: hundreds of queries that look at one key leave little of what they send back.
    sizes = _differentiate(exact, [*doubled[:2], doubled[2].abs()], wide.abs(), backward)
    terms = [sizes[0], None, None, sizes[-1]]
    relative = _error_of_weights(*doubled[:2])
    return tuple(
        Judgement(
            name + what,
            largest_error(mine, best),
            max(error_budget(best, *theirs, terms=size), 0.0 if size is None else relative * _largest(size)),
        )
        for what, mine, best, size, *theirs in zip(_NAMES, found, right, terms, *rough, strict=False)
    )


def _error_of_weights(query: Tensor, key: Tensor) -> float:
    """The relative error that one weight may bring along into a sum, in float32.

    A logit's rounding, in half units of what it sums, is the weight's relative error. Where one query sends back most
    of a key's gradient (a class token that looks at itself), a few orders of eager's sums need not show it.
    """
    logit = _largest(query.norm(dim=-1)) * _largest(key.norm(dim=-1)) * query.shape[-1] ** -0.5
    return (_ROUNDINGS + logit) * torch.finfo(torch.float32).eps / 2


def _largest(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def _differentiate(attend: Attend, tensors: Sequence[Tensor], gradient: Tensor, backward: bool) -> list[Tensor]:
    leaves = [one.detach().requires_grad_(backward) for one in tensors]
    with torch.set_grad_enabled(backward):
        output = attend(*leaves)
        return [output.detach(), *(torch.autograd.grad(output, leaves, gradient) if backward else ())]


def check_kernel(
    operator: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    *,
    options: Mapping[str, Any],
    formulations: Sequence[Callable[..., Tensor]] = (),
    backward: bool,
) -> Findings:
    """Judge an attention's kernel by the operator's own PyTorch path, which its tests hold to the specification.

    For an operator that selects nothing. In float64 that path is exact; in the dtype at hand, with the head dims
    shuffled, too, it is eager. Judged is one head of one image.

    Args:
        tensors: the operator's, by name, with images and heads in front; those beside `query`, `key` and `value` are
            passed on.
        options: its other arguments.
        formulations: others in plain PyTorch operations, that take the tensors: further orders of summation. A path
            that adds up in blocks errs less than one that adds key by key.
    """
    part = {name: one[:1, :1] for name, one in tensors.items()}
    query, key, value = (part.pop(name) for name in ("query", "key", "value"))
    rest = part

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return operator(q, k, v, **rest, **options)

    def eager(order: Tensor) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with only_backend("pytorch"):
                return own(q[..., order], k[..., order], v)

        return attend

    dim, generator = query.shape[-1], torch.Generator().manual_seed(0)
    orders = [torch.arange(dim), *(torch.randperm(dim, generator=generator) for _ in range(_ORDERS - 1))]
    others = [_in_float32(partial(one, **rest)) for one in formulations]
    judgements = judge_attention(
        own, eager(orders[0]), [*map(eager, orders), *others], (query, key, value), backward=backward
    )
    return Findings(operator.__name__, _name(query.dtype), judgements)


def _in_float32(attend: Attend) -> Attend:
    """Half types are computed in float32, as the operators do: in a half type throughout it would allow anything."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        return attend(q.to(wide), k.to(wide), v.to(wide)).to(q.dtype)

    return call


def check_multipole(
    query: Tensor, key: Tensor, value: Tensor, *, options: Mapping[str, Any], backward: bool
) -> Findings:
    """Judge multipole attention where nothing is a matter of selection: all clusters near, and none.

    The clusters are those that the operator finds. Judged are the first queries of one image's first two heads, with
    all keys; the specification in float64 on the same clusters is exact. That the clusters which are near are those
    that should be is a matter of the operator's tests: no speed depends on it.
    """
    query, key, value = query[:1, :2, :_QUERIES], key[:1, :2], value[:1, :2]
    judgements: tuple[Judgement, ...] = ()
    for what, near in (("all near ", 1.0), ("none near ", 0.0)):
        asked = {**options, "near": near}
        call: MultipoleCall = MULTIPOLE.bind(query, key, value, **asked)
        grid = asked.get("grid_size")
        clusters = clusters_of_keys(call, asked.get("iterations", 2), None if grid is None else tuple(grid))
        call = dataclasses.replace(call, assignment=clusters)

        def own(q: Tensor, k: Tensor, v: Tensor, call: MultipoleCall = call) -> Tensor:
            return MULTIPOLE.run(dataclasses.replace(call, query=q, key=k, value=v))

        def exact(q: Tensor, k: Tensor, v: Tensor, call: MultipoleCall = call) -> Tensor:
            return multipole_attention_reference(dataclasses.replace(call, query=q, key=k, value=v))

        eager = [exact, *(_in_another_order(call, seed) for seed in range(1, _ORDERS))]
        judgements += judge_attention(own, exact, eager, (query, key, value), backward=backward, name=what)
    return Findings("multipole_attention", _name(query.dtype), judgements)


def _in_another_order(call: MultipoleCall, seed: int) -> Attend:
    """The specification with keys, queries (prefixes apart) and head dims shuffled: the same sums in another order."""
    prefix, generator = call.num_prefix_tokens, torch.Generator().manual_seed(seed)
    first, dims = torch.arange(prefix), torch.randperm(call.query.shape[3], generator=generator)
    keys, queries = (torch.randperm(one.shape[2] - prefix, generator=generator) for one in (call.key, call.query))
    shuffled = dataclasses.replace(call, assignment=call.clusters[:, :, keys])
    keys, queries = torch.cat([first, keys + prefix]), torch.cat([first, queries + prefix])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q[:, :, queries][..., dims], k[:, :, keys][..., dims]
        moved = dataclasses.replace(shuffled, query=q, key=k, value=v[:, :, keys])
        return multipole_attention_reference(moved)[:, :, queries.argsort()]

    return attend


def check_density_peaks(x: Tensor, *, num_clusters: Sequence[int], neighbors: int = 5) -> Findings:
    """Ask for the very same grouping: as the published formulation in float64, as the reference where ties abound.

    In float64 no choice between distances of normal numbers is a matter of rounding, and in the dtype at hand distances
    of small whole numbers are exact.
    """
    problems = []
    first = x[:1].double()
    grouped = [one.assignment for one in density_peak_clusters(first, num_clusters, neighbors=neighbors)]
    if not all(map(torch.equal, grouped, published_density_peaks(first, num_clusters, neighbors))):
        problems.append("another grouping than the published formulation in float64")
    tokens, counts = min(x.shape[1], 784), [min(count, 196) for count in num_clusters]
    for levels in (2, 3, 5):
        ties = torch.randint(levels, (1, tokens, 8), generator=torch.Generator().manual_seed(levels)).to(x)
        expected, _ = density_peaks_reference(ties.double(), counts)
        grouped = [one.assignment for one in density_peak_clusters(ties, counts)]
        if not all(map(torch.equal, grouped, expected)):
            problems.append(f"{levels} levels: another grouping than the reference")
    asked = "the published grouping in float64, the reference's with ties"
    return Findings("density_peak_clusters", _name(x.dtype), (), tuple(problems), asked)


def check_kmeans(x: Tensor, *, num_clusters: int, iterations: int = 2, **options: Any) -> Findings:
    """Judge each of Lloyd's steps by the one before it, in float64 on one image.

    Centroids must be the means of the clusters before, within the error budget. No token may be nearer to another
    centroid than to its own by more than the rounding of |c|^2 - 2 x . c, the origin amid the tokens.
    """
    x = x[:1]
    judgements, problems = [], []
    before = kmeans_clusters(x, num_clusters, iterations=0, **options)
    for step in range(1, iterations + 1):
        found = kmeans_clusters(x, num_clusters, iterations=step, **options)
        assignment, own = before.assignment, found.centroids
        exact = _means(x.double(), assignment, before.centroids.double())
        wide = x.to(own.dtype)
        eager = [_means(wide, assignment, before.centroids)]
        for seed in range(1, _ORDERS):
            order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed)).to(x.device)
            eager.append(_means(wide[:, order], assignment[:, order], before.centroids))
        eager.append(_averaged(wide, assignment, before.centroids))
        origin = wide.mean(dim=1, keepdim=True)  # around it half types have as many digits as others
        eager.append(_means(wide - origin, assignment, before.centroids - origin) + origin)
        error = largest_error(own, exact)
        judgements.append(Judgement(f"centroids {step}", error, error_budget(exact, *eager)))
        excess = _excess(x, found.centroids, found.assignment)
        if not excess <= 0:
            problems.append(f"step {step}: a token is nearer to another centroid by {excess:.2g} beyond rounding")
        before = found
    return Findings("kmeans_clusters", _name(x.dtype), tuple(judgements), tuple(problems))


def _means(x: Tensor, assignment: Tensor, before: Tensor) -> Tensor:
    """Means of the clusters (1, M, C); one without tokens stays where it was."""
    index = assignment[0]
    sums = torch.zeros_like(before[0]).index_add_(0, index, x[0])
    counts = index.bincount(minlength=before.shape[1]).unsqueeze(-1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), before[0]).unsqueeze(0)


def _averaged(x: Tensor, assignment: Tensor, before: Tensor) -> Tensor:
    """The same as a product with weights 1 / n: numbers of few digits add up exactly, their products do not."""
    counts = assignment[0].bincount(minlength=before.shape[1])
    weights = torch.nn.functional.one_hot(assignment[0], before.shape[1]).to(x) / counts.clamp(min=1)
    return torch.where(counts.unsqueeze(-1) > 0, weights.mT @ x[0], before[0]).unsqueeze(0)


def _excess(x: Tensor, centroids: Tensor, assignment: Tensor) -> float:
    """By how much a squared distance to the own centroid exceeds the smallest, beyond what rounding allows."""
    unit = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    x, centroids = x.double(), centroids.double()
    squares = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").square()
    taken = squares.gather(-1, assignment.unsqueeze(-1)).squeeze(-1)
    extent = (x - x.mean(dim=1, keepdim=True)).norm(dim=-1).max() + x.abs().max() * unit
    bound = 4 * (x.shape[-1] + 8) * unit * extent.square()
    return float((taken - squares.amin(dim=-1) - bound).max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
