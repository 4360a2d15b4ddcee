"""Metrics that read several positions of each prompt, in every technique: against whole passes with hooks, prompt by prompt."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES
from helpers.reference import Cell, activations, patched_logits
from helpers.reference_circuits import patch_edges, run_circuit, some_names, whole_run
from helpers.tiny import LENGTH, make_pairs, model_of

SHAPES = ((LENGTH, 2), (LENGTH, 4), (5, 1), (LENGTH, 6))


class Words:
    """Tokens are their numbers."""

    d_vocab = D_VOCAB

    def to_tokens(self, text, prepend_bos=None):
        return torch.tensor([[int(word) for word in text.split()]])

    def to_str_tokens(self, text):
        return [str(int(token)) for token in text]

    def to_single_token(self, text):
        return int(text)


def forced_pairs() -> mk.PromptPairs:
    """Answers of one to three tokens."""
    plain = make_pairs(SHAPES)
    return mk.PromptPairs.teacher_forced(
        Words(), plain.clean, plain.corrupted, [[5, 9], "7", [8, 3, 11], [4, 6]], positions={"second": [1, 1, 1, 1]}
    )


def naive_loss(logits: Tensor, tokens: Tensor, places: list[int]) -> float:
    """Of one prompt's logits `[pos d_vocab]`."""
    terms = [torch.log_softmax(logits[at].double(), -1)[tokens[at + 1]] for at in places]
    return -float(torch.stack(terms).mean())


def every_place(n: int) -> list[int]:
    return list(range(n - 1))


def naive_answer(pairs: mk.PromptPairs, i: int, logits: Tensor) -> float:
    answer, length = pairs.continuation[i], len(pairs.clean.tokens[i])
    first = length - len(answer)
    return sum(float(torch.log_softmax(logits[first + k].double(), -1)[token]) for k, token in enumerate(answer))


def naive(model, pairs, read, site: str, over: str) -> Tensor:
    """`[cell prompt]`: `read(pair, logits [pos d_vocab])` of a whole pass a cell; NaN where the prompt has no such position."""
    heads = model.n_kv_heads if site in ("k", "v") else model.n_heads
    longest = int(pairs.clean.lengths.max())
    sizes = {"layer": model.n_layers, "pos": longest, "head": heads}
    grid = [
        dict(zip(over.split(), at, strict=True)) for at in itertools.product(*(range(sizes[d]) for d in over.split()))
    ]
    found = torch.full((len(grid), len(pairs)), torch.nan, dtype=torch.float64)
    for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
        source, base = activations(model.bridge, clean[None]), activations(model.bridge, corrupted[None])
        mine = [k for k, at in enumerate(grid) if at.get("pos", 0) < len(clean)]
        patched = patched_logits(model.bridge, corrupted[None], base, source, site, [Cell(**grid[k]) for k in mine])
        for k, logits in zip(mine, patched, strict=True):
            found[k, i] = read(i, logits)
    return found


def same(found: mk.Result, expected: Tensor, tolerance: float = 1e-10) -> None:
    values = found.values.reshape(expected.shape).double()
    assert torch.equal(values.isnan(), expected.isnan())
    assert float((values - expected).nan_to_num().abs().max()) <= tolerance
    base = found.baseline[found.base][None].double()
    assert float((values - base).nan_to_num().abs().max()) > 1e-3  # control: cells do something


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_in_every_family(family):
    model, pairs = model_of(family), make_pairs(SHAPES)
    # Attention of GPT-J and GPT-Neo multiplies in float32, with other kernels for one query than for several.
    tolerance = {"mixtral": 1e-4, "gptj": 1e-5, "gpt_neo": 1e-5}.get(family, 1e-10)
    site, over = ("resid_pre", "layer pos") if len(family) % 2 else ("z", "layer pos head")
    found = mk.activation_patching(model, pairs, mk.loss, site=site, over=over, progress=False)
    assert found.provenance["replay"] == "suffix"
    tokens = pairs.clean.tokens
    same(
        found,
        naive(model, pairs, lambda i, x: naive_loss(x, tokens[i], every_place(len(tokens[i]))), site, over),
        tolerance,
    )
    forced = forced_pairs()
    found = mk.activation_patching(model, forced, mk.answer_log_prob, site=site, over=over, progress=False)
    assert found.provenance["replay"] == "suffix"
    same(found, naive(model, forced, lambda i, x: naive_answer(forced, i, x), site, over), tolerance)


@pytest.mark.parametrize("replay", [True, False])
def test_some_positions_before_and_after_what_is_edited(replay):
    """A cell at a position behind some of the places that are read, and before others."""
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    with pytest.raises(ValueError, match="each position once"):
        mk.loss(pairs, positions=[0, 5, -2])  # 5 is -2 of seven tokens
    metric = mk.loss(pairs, positions=[0, 3, -3])
    places = [[0, 3, n - 3] for n in pairs.clean.lengths.tolist()]
    tokens = pairs.clean.tokens
    from mechkit.engine import Edit, sweep

    cells = [(Edit("z", layer, "source", head=1, pos=pos),) for layer in range(model.n_layers) for pos in range(5)]
    found = sweep(model, pairs.corrupted, cells, metric, source=pairs.clean, progress=False, replay=replay)
    expected = naive(model, pairs, lambda i, x: naive_loss(x, tokens[i], places[i]), "z", "layer pos head")
    expected = expected.reshape(model.n_layers, LENGTH, model.n_heads, -1)[:, :5, 1].flatten(0, 1)
    assert torch.allclose(found.values, expected, atol=1e-10, rtol=0)
    assert found.replay.startswith("suffix" if replay else "full")


def test_noising_and_a_budget_that_cuts_batches():
    model, pairs = model_of("gpt2"), forced_pairs()
    whole = mk.activation_patching(
        model, pairs, mk.answer_log_prob, over="layer pos head", direction="noise", progress=False
    )
    small = mk.activation_patching(
        model, pairs, mk.answer_log_prob, over="layer pos head", direction="noise", budget=300_000, progress=False
    )
    assert torch.allclose(whole.values, small.values, atol=1e-12, equal_nan=True)
    swapped = mk.PromptPairs(
        pairs.corrupted, pairs.clean, pairs.right, pairs.wrong, pairs.positions, continuation=pairs.continuation
    )
    other = mk.activation_patching(model, swapped, mk.answer_log_prob, over="layer pos head", progress=False)
    assert torch.equal(whole.values.nan_to_num(), other.values.nan_to_num())


def test_ablation_of_plain_prompts():
    model, prompts = model_of("llama"), make_pairs(SHAPES).clean
    late = functools.partial(mk.loss, positions=slice(2, None))
    found = mk.ablation(model, prompts, late, over="layer head", mode="zero", progress=False)
    expected = torch.zeros(model.n_layers, model.n_heads, len(prompts), dtype=torch.float64)
    for i, row in enumerate(prompts.tokens):
        for layer in range(model.n_layers):
            for head in range(model.n_heads):

                def zero(z, hook, head=head):
                    z = z.clone()
                    z[:, :, head] = 0
                    return z

                with torch.no_grad():
                    logits = model.run_with_hooks(row[None], [(("z", layer), zero)])[0]
                expected[layer, head, i] = naive_loss(logits, row, list(range(2, len(row) - 1)))
    assert torch.allclose(found.values, expected, atol=1e-10, rtol=0)
    with torch.no_grad():
        own = [float(model(row[None], return_type="loss")) for row in prompts.tokens]
    assert torch.allclose(
        mk.ablation(model, prompts, mk.loss, progress=False).baseline["clean"], torch.tensor(own).double()
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon"])
def test_gradients(family):
    """Attribution patching against autograd through the bridge; edges' estimates against those of whole runs."""
    model, pairs = model_of(family), forced_pairs()
    found = mk.attribution_patching(model, pairs, mk.answer_log_prob, site="z", over="layer head", progress=False)
    expected = torch.zeros(model.n_layers, model.n_heads, len(pairs), dtype=torch.float64)
    for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
        source, leaves = activations(model.bridge, clean[None]), {}

        def leaf(x, hook, leaves=leaves):
            leaves["z"] = x.detach().requires_grad_()
            return leaves["z"]

        for layer in range(model.n_layers):
            name = f"blocks.{layer}.attn.hook_z"
            with torch.enable_grad():
                logits = model.bridge.run_with_hooks(corrupted[None], fwd_hooks=[(name, leaf)])[0]
                answer, first = pairs.continuation[i], len(clean) - len(pairs.continuation[i])
                value = sum(logits[first + k].log_softmax(-1)[token] for k, token in enumerate(answer))
                gradient = torch.autograd.grad(value, leaves["z"])[0]
            terms = (gradient * (source[name] - leaves["z"].detach())).reshape(len(clean), model.n_heads, -1)
            expected[layer, :, i] = terms.sum((0, 2))
    assert torch.allclose(found.values - found.baseline["corrupted"], expected, atol=1e-9, rtol=0)
    assert float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edges_and_circuits(family):
    model, pairs = model_of(family), forced_pairs()
    names = some_names(model, 12)
    exact = mk.edge_patching(model, pairs, mk.answer_log_prob, edges=names, progress=False)
    circuit = mk.Circuit.from_edges(model, some_names(model, 40, seed=1))
    report = mk.evaluate_circuit(circuit, model, pairs, mk.answer_log_prob, random=0, progress=False)
    for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
        base, source = whole_run(model, corrupted[None]), whole_run(model, clean[None])
        patched = patch_edges(model, base, source, corrupted[None], names)
        for k, (name, logits) in enumerate(zip(names, patched, strict=True)):
            graph = exact.graph
            w, r = graph.index(graph.edge(name))
            effect = naive_answer(pairs, i, logits) - naive_answer(pairs, i, base.logits[0])
            assert abs(float(exact.per_prompt[w, r, i]) - effect) < 1e-9, (k, name)
        logits = run_circuit(model, clean[None], corrupted[None], [edge.name for edge in circuit])[0]
        assert abs(float(report.runs.sel(run="circuit", prompt=i)) - naive_answer(pairs, i, logits)) < 1e-8


def test_it_belongs_to_its_prompts():
    pairs, plain = forced_pairs(), make_pairs(SHAPES)
    metric = mk.answer_log_prob(pairs)
    metric.check(pairs)
    metric[[2, 0]].check(pairs[[2, 0]])
    with pytest.raises(ValueError, match="another order"):
        metric.check(pairs[[1, 0, 2, 3]])
    elsewhere = mk.PromptPairs(
        pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, continuation=tuple(a[-1:] for a in pairs.continuation)
    )
    with pytest.raises(ValueError, match="divided from the prompts elsewhere"):
        metric.check(elsewhere)
    loss = mk.loss(plain)
    loss.check(plain)
    loss.check(plain.clean)
    mk.loss(plain.clean).check(plain)
    with pytest.raises(ValueError, match="other"):
        loss.check(make_pairs(SHAPES, seed=1))
    assert loss[[2]].positions.shape == (1, LENGTH - 1)
    assert loss.n_places == LENGTH - 1
    assert loss.last_read.tolist() == [n - 2 for n in plain.clean.lengths.tolist()]


def test_teacher_forced_pairs():
    pairs = forced_pairs()
    assert pairs.clean.lengths.tolist() == [LENGTH + 1, LENGTH, 7, LENGTH + 1]
    assert pairs.positions["ANSWER"].tolist() == [LENGTH - 1, LENGTH - 1, 4, LENGTH - 1]
    assert pairs.positions["END"].tolist() == [LENGTH, LENGTH - 1, 6, LENGTH]
    assert pairs.positions["second"].tolist() == [1, 1, 1, 1]
    assert pairs[[2]].continuation == ((8, 3, 11),)
    one = mk.log_prob(pairs[[1]])  # an answer of one token is what log_prob reads
    logits = torch.randn(1, D_VOCAB, dtype=torch.float64)
    both = [
        metric.read(x, torch.tensor([0]), None)
        for metric, x in ((one, logits), (mk.answer_log_prob(pairs[[1]]), logits[:, None]))
    ]
    assert torch.allclose(both[0], both[1])
    for make in (mk.logit_diff, mk.accuracy, mk.prob_diff):
        with pytest.raises(ValueError, match="no wrong"):
            make(pairs)


def test_reduce():
    pairs = forced_pairs()
    logits = torch.randn(4, 3, D_VOCAB, dtype=torch.float64)
    total, mean = (mk.answer_log_prob(pairs, reduce=how).read(logits, torch.arange(4), None) for how in ("sum", "mean"))
    assert torch.allclose(mean * torch.tensor([2, 1, 3, 2]), total)


def test_in_context_score():
    prompts = make_pairs(SHAPES).clean
    logits = torch.randn(4, 2, D_VOCAB, dtype=torch.float64)
    score = mk.in_context_score(prompts, early=0, late=[2]).read(logits, torch.arange(4), None)
    tokens = torch.stack([row[[1, 3]] for row in prompts.tokens])
    losses = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(score, losses[:, 1] - losses[:, 0])


def test_pooled_answers():
    pairs = mk.PromptPairs.from_tokens([[1, 2]], [[1, 3]], [((4, 5), (6, 7, 8))])
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0, 4.0]])
    mean, odds = (mk.logit_diff(pairs, pool=how).read(logits, torch.tensor([0]), None) for how in ("mean", "logsumexp"))
    assert float(mean) == pytest.approx(2 - 2)
    assert float(odds) == pytest.approx(float(logits[0, :2].logsumexp(0) - logits[0, 2:].logsumexp(0)))
    ragged = mk.PromptPairs.from_tokens([[1, 2], [2, 3]], [[1, 3], [2, 1]], [(4, (6, 7, 8)), ((4, 5), 6)])
    two = mk.logit_diff(ragged, pool="logsumexp").read(logits.expand(2, -1), torch.arange(2), None)
    assert torch.allclose(
        two, torch.stack([logits[0, 0] - logits[0, 2:].logsumexp(0), logits[0, :2].logsumexp(0) - logits[0, 2]])
    )


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (-1, "is the last of"),
        ([0, "END"], "'END' is the last of"),
        (["S9"], "a name among END"),
        ([99], "at least one position"),
        (slice(99, None), "at least one position"),
        ([], "at least one position"),
    ],
)
def test_refused_positions(positions, message):
    with pytest.raises(ValueError, match=message):
        mk.loss(make_pairs(SHAPES), positions=positions)


def test_refusals():
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    with pytest.raises(ValueError, match="teacher_forced"):
        mk.answer_log_prob(pairs)
    with pytest.raises(ValueError, match="reads one position"):
        mk.direct_logit_attribution(model, pairs, mk.loss(pairs))
    with pytest.raises(ValueError, match="continuations: expected 4"):
        mk.PromptPairs.teacher_forced(Words(), pairs.clean, pairs.corrupted, ["5"])
    with pytest.raises(ValueError, match=r"continuations\[0\]: expected at least one token"):
        mk.PromptPairs.teacher_forced(Words(), pairs.clean, pairs.corrupted, ["", "5", "5", "5"])
    with pytest.raises(
        ValueError, match=r"continuation\[0\]: expected an answer of which all tokens but the last end both prompts"
    ):
        mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, continuation=((9, 9, 9),) * 4)


def test_the_divergence_where_a_loss_reads():
    """What learned masks compare by default where the metric reads several positions: the mean over the places, each once."""
    from mechkit.circuits._objective import divergence

    pairs = make_pairs(SHAPES)
    kl = divergence(pairs, mk.loss(pairs), None)
    logits, target = torch.randn(2, 4, kl.n_places, D_VOCAB, dtype=torch.float64)
    found = kl.read(logits, torch.arange(4), target)
    for i, n in enumerate(pairs.clean.lengths.tolist()):
        log_p, log_q = target[i, : n - 1].log_softmax(-1), logits[i, : n - 1].log_softmax(-1)
        assert float(found[i]) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
