"""Gradients at ties and bounds, and the neutral elements of what is empty: exact numbers on exact inputs."""

from __future__ import annotations

import pytest
import tie_checks
import torch

import fastreward as fr
from fastreward import losses
from fastreward._arguments.tokens import Tokens
from fastreward._runtime.dispatch import implementation
from fastreward.language.node import Level
from fastreward.language.objective import PolicyCall, token_gradient
from fastreward.language.ops import OPS

BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", tie_checks.RULES)
def test_gradient_at_a_tie(rule: str, backend: str) -> None:
    with fr.backend(backend):
        tie_checks.check_ties(rule)


@pytest.mark.parametrize("rule", tie_checks.RULES)
def test_evaluate_has_the_same_gradient(rule: str) -> None:
    x, y, wanted = tie_checks.tokens(rule)
    x.requires_grad_()
    value = tie_checks.at_ties(rule=rule).evaluate(logprob=x, old_logprob=y)
    total = value.sum() if value.ndim == 2 else value.sum() * x.shape[1]  # of a sequence: the value of each token
    (gradient,) = torch.autograd.grad(total, x)
    assert gradient.tolist() == wanted.tolist()


def test_every_operator_with_a_tie_has_a_rule() -> None:
    smooth = {"add", "sub", "mul", "neg"} | {name for name, op in OPS.items() if op.costly}
    drawn = {"stop_gradient", "outside"}  # without a gradient; what clip's rule is made of
    text = " ".join(tie_checks.RULES)
    spelled = {"and": "&", "or": "|", "not": "~"}
    for name, op in OPS.items():
        assert name in smooth | drawn or (op.symbol or spelled.get(name, name)) in text, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_of_negative_and_positive_values_beside_an_empty_sequence(backend: str) -> None:
    """Neutral elements are infinite: 0 would be larger than every log-prob."""

    @losses.define(aggregation="token-sum")
    def extremes(t):  # type: ignore[no-untyped-def]
        x = t.logprob
        t.report(
            batch_max=losses.batch_max(x),
            batch_min=losses.batch_min(-x),
            seq_max=losses.seq_max(x),
            seq_min=losses.seq_min(-x),
            group_max=losses.group_max(losses.seq_max(x)),
            group_min=losses.group_min(losses.seq_min(-x)),
        )
        return losses.batch_max(x) + losses.batch_min(-x) + losses.seq_max(x) + t.logprob

    x = torch.tensor([[-3.0, -2.0], [-1.0, -1.0], [-4.0, -5.0]], requires_grad=True)
    mask, old = torch.tensor([[1, 1], [0, 0], [1, 0]]), torch.zeros(3, 2)
    with fr.backend(backend):
        result = fr.policy_loss(x, old, torch.ones(3), mask, loss=extremes(), group_ids=[0, 0, 0])
        result.loss.backward()
    found = {name: result.metrics[name].item() for name in ("batch_max", "batch_min", "seq_max", "seq_min")}
    assert found == {"batch_max": -2.0, "batch_min": 2.0, "seq_max": -3.0, "seq_min": 3.0}
    assert (result.metrics["group_max"].item(), result.metrics["group_min"].item()) == (-2.0, 2.0)
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 3.0], [0.0, 0.0], [2.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extreme", [losses.group_max, losses.group_min])
def test_equal_members_of_a_group_share_what_all_of_them_send_back(extreme, backend: str) -> None:  # type: ignore[no-untyped-def]
    @losses.define(aggregation="token-sum")
    def of_groups(t):  # type: ignore[no-untyped-def]
        return t.advantage * extreme(losses.seq_mean(t.logprob))

    rows = [-2.0, -2.0, -1.0, -3.0] if extreme is losses.group_min else [-2.0, -2.0, -3.0, -1.0]
    x = torch.tensor(rows).unsqueeze(-1).requires_grad_()
    with fr.backend(backend):
        result = fr.policy_loss(
            x, torch.zeros(4, 1), torch.tensor([1.0, 10.0, 100.0, 7.0]), loss=of_groups(), group_ids=[0, 0, 0, 1]
        )
        result.loss.backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [55.5, 55.5, 0.0, 7.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extreme", [losses.batch_max, losses.batch_min])
def test_equal_sequences_of_the_batch_share(extreme, backend: str) -> None:  # type: ignore[no-untyped-def]
    @losses.define(aggregation="token-sum")
    def of_the_batch(t):  # type: ignore[no-untyped-def]
        return t.advantage * extreme(losses.seq_mean(t.logprob))

    x = torch.tensor([-2.0, -2.0, -3.0 if extreme is losses.batch_max else -1.0]).unsqueeze(-1).requires_grad_()
    with fr.backend(backend):
        result = fr.policy_loss(x, torch.zeros(3, 1), torch.tensor([1.0, 10.0, 100.0]), loss=of_the_batch())
        result.loss.backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [55.5, 55.5, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_infinite_maximum_of_an_empty_sequence_spoils_no_gradient(backend: str) -> None:
    """The whole batch's value gets the sum of all sequences' gradients; that of an empty one would be 0 * inf."""

    @losses.define(aggregation="token-sum")
    def product(t):  # type: ignore[no-untyped-def]
        return t.logprob * (losses.seq_max(t.logprob) * losses.batch_mean(t.logprob))

    x = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [0, 0], [1, 1]])
    with fr.backend(backend):
        fr.policy_loss(x, torch.zeros(3, 2), torch.ones(3), mask, loss=product()).loss.backward()
    assert x.grad is not None
    # Of sum_i s_i m_i M, s the sequences' sums, m their maxima, M the mean: m M + s M [where m is] + sum(s m) / 4.
    assert x.grad.tolist() == [[28.5, 18.0], [0.0, 0.0], [70.5, 32.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_sequence_counts_in_no_loss_per_sequence(backend: str) -> None:
    @losses.define(aggregation="seq-mean-token-mean")
    def largest(t):  # type: ignore[no-untyped-def]
        return losses.seq_max(t.logprob)

    x = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], requires_grad=True)
    with fr.backend(backend):
        mask = torch.tensor([[1, 1], [0, 0], [1, 1]])
        result = fr.policy_loss(x, torch.zeros(3, 2), torch.ones(3), mask, loss=largest())
        result.loss.backward()
    assert result.loss.item() == -3.0
    assert x.grad is not None
    assert x.grad.tolist() == [[0.5, 0.0], [0.0, 0.0], [0.5, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_cumulative_sums_take_equal_keys_in_the_order_of_the_rows(backend: str, reverse: bool) -> None:
    """Keys 5, 7, 5, 5: from the largest down rows 1, 0, 2, 3. Gradients go to the rows that a sum has taken."""

    @losses.define(static=("back",), aggregation="token-sum")
    def cumulative(t, back=False):  # type: ignore[no-untyped-def]
        x, key = losses.seq_mean(t.logprob), losses.seq_mean(t.advantage)
        return losses.seq_mean(t.old_logprob) * losses.group_cumsum(x, by=key, reverse=back)

    x = torch.tensor([-1.0, -2.0, -4.0, -8.0]).unsqueeze(-1).requires_grad_()
    upstream = torch.tensor([1.0, 10.0, 100.0, 1000.0]).unsqueeze(-1)
    with fr.backend(backend):
        result = fr.policy_loss(
            x, upstream, torch.tensor([5.0, 7.0, 5.0, 5.0]), loss=cumulative(back=reverse), group_size=4,
            return_token_loss=True,
        )  # fmt: skip
        result.loss.backward()
    sums = [-13.0, -15.0, -12.0, -8.0] if reverse else [-3.0, -2.0, -7.0, -15.0]
    assert result.token_loss is not None
    assert (result.token_loss / upstream).flatten().tolist() == sums
    assert x.grad is not None
    assert x.grad.flatten().tolist() == ([11.0, 10.0, 111.0, 1111.0] if reverse else [1101.0, 1111.0, 1100.0, 1000.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_per_sequence_is_nan_where_a_log_prob_is(backend: str) -> None:
    """An illegal label, which a GPU does not look for, gives NaN: not the gradient that its sequence has everywhere."""
    levels = (("logprob", Level.TOKEN), ("old_logprob", Level.TOKEN), ("advantage", Level.SEQUENCE))
    gradient = token_gradient(losses.reinforce(), PolicyCall(levels, "token-sum"))
    assert gradient is not None
    given = {"logprob": torch.tensor([[-1.0, torch.nan, -2.0]]), "advantage": torch.tensor([3.0])}
    inputs = [given[str(n.name)] for n in gradient.program.inputs]
    run = implementation("program", backend).run
    (found,), _ = run(gradient.program, inputs, [Tokens((1, 3))], [], None)
    assert torch.equal(found.nan_to_num(7.0), torch.tensor([[-3.0, 7.0, -3.0]]))
