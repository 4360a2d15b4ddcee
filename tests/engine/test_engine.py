"""The sweep: its cost, its budget, what it refuses, and that it falls back rather than be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import mechkit as mk
from helpers.families import D_VOCAB, N_LAYERS, build_hf
from helpers.tiny import LENGTH, make_model, make_pairs, whole_vocabulary
from mechkit.engine import _answers, _memory, _sweep
from mechkit.engine._edits import EditPlan
from mechkit.engine._operations import Operation


@pytest.fixture(scope="module")
def llama() -> mk.HookedModel:
    return make_model("llama")


def test_slow_and_fast_agree(llama):
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    fast = mk.activation_patching(llama, pairs, metric, site="v", over="layer pos head", progress=False)
    slow = mk.activation_patching(llama, pairs, metric, site="v", over="layer pos head", progress=False, replay=False)
    assert fast.provenance["replay"] == "suffix"
    assert slow.provenance["replay"] == "full: asked for"
    assert torch.allclose(fast.values, slow.values, atol=1e-10, rtol=0, equal_nan=True)


def test_cost_counts_only_what_a_change_can_reach(llama):
    """One pair, first difference at 4 of 7: each head's row runs 3 positions through the blocks from its own on."""
    pairs = make_pairs(((LENGTH, 4),))
    metric = whole_vocabulary(pairs)
    result = mk.activation_patching(llama, pairs, metric, site="z", progress=False)
    base_and_source = 2 * LENGTH * N_LAYERS
    rows = sum(llama.n_heads * 3 * (N_LAYERS - layer) for layer in range(N_LAYERS))
    # The proof: an unedited whole pass; every block from position 4 on; a row that joins at each layer, once replayed and once by
    # whole passes.
    proof = LENGTH * N_LAYERS + 3 * N_LAYERS + 3 * (4 + 3 + 2 + 1) + 4 * LENGTH * N_LAYERS
    assert result.cost.block_tokens == base_and_source + rows + proof
    assert result.cost.naive_block_tokens == N_LAYERS * llama.n_heads * LENGTH * N_LAYERS


def test_positions_before_the_first_difference_cost_nothing_and_equal_the_baseline(llama):
    pairs = make_pairs(((LENGTH, 4),))
    result = mk.activation_patching(
        llama, pairs, whole_vocabulary(pairs), site="resid_pre", over="layer pos", progress=False
    )
    before, after = result.values[:, :4], result.values[:, 4:]
    assert torch.equal(before, result.baseline["corrupted"].expand_as(before))
    assert not torch.allclose(after, result.baseline["corrupted"].expand_as(after), atol=1e-3)
    last = mk.activation_patching(
        llama, pairs, whole_vocabulary(pairs), site="resid_pre", over="layer pos", positions=[0, 1], progress=False
    )
    assert last.cost.block_tokens == 3 * LENGTH * N_LAYERS  # two runs, and a whole pass of a row that changes nothing


@pytest.mark.parametrize("budget", [1, 20_000, 10**9])
def test_results_do_not_depend_on_the_budget(llama, budget):
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    one = mk.activation_patching(llama, pairs, metric, site="z", over="layer pos head", progress=False)
    other = mk.activation_patching(llama, pairs, metric, site="z", over="layer pos head", progress=False, budget=budget)
    assert torch.allclose(one.values, other.values, atol=1e-11, rtol=0, equal_nan=True)


def test_ragged_prompts_equal_each_prompt_alone(llama):
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    together = mk.activation_patching(llama, pairs, metric, site="mlp_out", over="layer pos", progress=False)
    for i in range(len(pairs)):
        alone = mk.activation_patching(
            llama, pairs[[i]], whole_vocabulary(pairs[[i]]), site="mlp_out", over="layer pos", progress=False
        )
        length = len(pairs.clean.tokens[i])
        assert torch.allclose(together.values[:, :length, i], alone.values[:, :, 0], atol=1e-11, rtol=0)
        assert bool(together.values[:, length:, i].isnan().all())


def test_out_of_memory_halves_the_batch_and_goes_on(llama, monkeypatch):
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    expected = mk.activation_patching(llama, pairs, metric, progress=False)
    largest = []
    answer_batch = _answers._answer_packed_batch

    def small_device(state, replayer, rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("out of memory, on purpose")
        largest.append(len(rows))
        return answer_batch(state, replayer, rows)

    monkeypatch.setattr(_answers, "_answer_packed_batch", small_device)
    found = mk.activation_patching(llama, pairs, metric, progress=False)
    assert torch.allclose(found.values, expected.values, atol=1e-11, rtol=0)
    assert 1 < max(largest) <= 3

    always = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("always"))  # noqa: E731
    monkeypatch.setattr(_answers, "_answer_packed_batch", always)
    with pytest.raises(torch.OutOfMemoryError):
        mk.activation_patching(llama, pairs, metric, progress=False)
    assert not llama.has_hooks


def test_the_batch_follows_the_budget_and_halves(llama):
    plan = EditPlan([(mk.Edit("z", 0),)], N_LAYERS)
    budget = _memory.Budget(10**6, None)
    before = budget.rows_at_once(llama, 100, 50, plan)
    budget.halve()
    assert budget.bytes == 5 * 10**5
    assert 1 <= budget.rows_at_once(llama, 100, 50, plan) <= before / 2 + 1
    with pytest.raises(ValueError, match="budget: expected a positive number"):
        _memory.Budget.of(llama, 0)


def test_callable_metric_sees_all_prompts_in_order_and_full_logits(llama):
    pairs = make_pairs(((LENGTH, 2), (LENGTH, 4)))
    seen = []

    def last_logit_of_each(logits):
        seen.append(tuple(logits.shape))
        return logits[torch.arange(2), -1, torch.tensor([5, 6])] + logits[:, 0, 3]

    found = mk.activation_patching(llama, pairs, last_logit_of_each, site="z", over="layer pos head", progress=False)
    slow = mk.activation_patching(
        llama, pairs, last_logit_of_each, site="z", over="layer pos head", progress=False, replay=False
    )
    assert set(seen) == {(2, LENGTH, D_VOCAB)}
    assert torch.allclose(found.values, slow.values, atol=1e-10, rtol=0)
    for budget in (1, 10**5):
        small = mk.activation_patching(
            llama, pairs, last_logit_of_each, site="z", over="layer pos head", progress=False, budget=budget
        )
        assert torch.allclose(found.values, small.values, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="plain callable needs prompts of one length"):
        mk.activation_patching(llama, make_pairs(), last_logit_of_each, progress=False)
    with pytest.raises(ValueError, match="one real value per prompt"):
        mk.activation_patching(llama, pairs, lambda logits: logits.mean(), progress=False)


def test_kl_is_zero_where_everything_is_restored_and_reads_its_reference(llama):
    pairs = make_pairs()
    for reference, zero in (("clean", "clean"), ("corrupted", "corrupted")):
        metric = mk.kl_divergence(pairs, reference=reference)
        result = mk.activation_patching(llama, pairs, metric, site="resid_post", over="layer", progress=False)
        assert float(result.baseline[zero].abs().max()) < 1e-12
        other = "corrupted" if zero == "clean" else "clean"
        assert float(result.baseline[other].min()) > 1e-3
        assert torch.allclose(result.values, result.baseline["clean"].expand_as(result.values), atol=1e-10)


@dataclass(frozen=True)
class Add(Operation):
    """An operation that is not the library's: the value is added three times."""

    keeps_equal: ClassVar[bool] = False
    looks: ClassVar[bool] = True
    times: float = 3.0

    def apply(self, x, operand):
        return x + self.times * operand


class AddAsIfItWereSet(Add):
    """The planted defect: it says that nothing changes where value and activation are equal."""

    keeps_equal: ClassVar[bool] = True


@pytest.mark.parametrize("kind", [Add, AddAsIfItWereSet])
def test_an_operation_of_ones_own_equals_hooks(llama, kind):
    """Source values are added to the base run's, before the first difference too; what is claimed falsely is refuted."""
    pairs = make_pairs(((LENGTH, 4), (LENGTH, 4)))
    metric = whole_vocabulary(pairs)
    places = [("z", 1, 0, 2), ("z", 2, 3, 5), ("resid_pre", 1, None, 1), ("resid_post", 2, None, 6)]
    cells = [(mk.Edit(site, layer, head=head, pos=pos, operation=kind()),) for site, layer, head, pos in places]
    cells.append((mk.Edit("z", 1, head=0, operation=kind(2.0)), mk.Edit("z", 1, head=0, pos=3)))  # the later one wins
    answers = mk.sweep(llama, pairs.corrupted, cells, metric, source=pairs.clean, progress=False)
    source, base = (torch.stack(prompts.tokens) for prompts in (pairs.clean, pairs.corrupted))
    _, cache = llama.run_with_cache(source)
    for i, cell in enumerate(cells):

        def edit(x, hook, cell=cell):
            x = x.clone()
            for one in cell:
                at = (slice(None), slice(None) if one.pos is None else one.pos, *([one.head] * (one.head is not None)))
                value = cache[one.site, one.layer][at]
                x[at] = one.operation.apply(x[at], value)
            return x

        logits = llama.run_with_hooks(base, fwd_hooks=[((cell[0].site, cell[0].layer), edit)])
        expected = metric.read(logits[torch.arange(len(pairs)), metric.positions], None, None)
        assert torch.allclose(answers.values[i], expected, atol=1e-10, rtol=0), cell
    assert answers.replay == "suffix" if kind is Add else answers.replay.startswith("full: ")


def test_several_edits_in_one_cell(llama):
    """Patching two heads in two layers at once, against a forward pass with both hooks."""
    pairs = make_pairs(((LENGTH, 2),))
    metric = whole_vocabulary(pairs)
    cells = [
        (mk.Edit("z", 1, head=0), mk.Edit("mlp_out", 2, pos=5), mk.Edit("resid_post", 3, pos=6, neuron=2)),
        (mk.Edit("z", 3, head=2), mk.Edit("z", 3, head=1, pos=4)),
        (mk.Edit("k", 2, head=1), mk.Edit("resid_post", 0, pos=3)),
    ]
    answers = mk.sweep(llama, pairs.corrupted, cells, metric, source=pairs.clean, progress=False)
    assert answers.replay == "suffix"
    _, clean = llama.run_with_cache(pairs.clean.tokens[0])
    for i, cell in enumerate(cells):
        hooks = []
        for edit in cell:

            def write(x, hook, edit=edit):
                at = [slice(None)] * x.ndim
                if edit.pos is not None:
                    at[1] = edit.pos
                if edit.head is not None:
                    at[2] = edit.head
                if edit.neuron is not None:
                    at[-1] = edit.neuron
                x[tuple(at)] = clean[edit.site, edit.layer][tuple(at)]
                return x

            hooks.append(((edit.site, edit.layer), write))
        with torch.no_grad():
            expected = metric.read(
                llama.run_with_hooks(pairs.corrupted.tokens[0], hooks)[:, -1], torch.tensor([0]), None
            )
        assert torch.allclose(answers.values[i], expected, atol=1e-10, rtol=0)
        assert float((expected - answers.base).abs()) > 1e-4


def test_given_values_are_written(llama):
    pairs = make_pairs(((LENGTH, 2), (LENGTH, 4)))
    vector = torch.randn(1, 1, llama.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cells = [(mk.Edit("resid_pre", 2, "steer", pos=3),), (mk.Edit("resid_pre", 2, "steer"),)]
    metric = whole_vocabulary(pairs)
    answers = mk.sweep(llama, pairs.clean, cells, metric, values={"steer": {("resid_pre", 2): vector}}, progress=False)
    tokens = torch.stack(pairs.clean.tokens)
    for i, at in enumerate((3, slice(None))):

        def write(x, hook, at=at):
            x[:, at] = vector[:, 0] if at == 3 else vector
            return x

        with torch.no_grad():
            logits = llama.run_with_hooks(tokens, [(("resid_pre", 2), write)])[:, -1]
        assert torch.allclose(answers.values[i], metric.read(logits, torch.arange(2), None), atol=1e-10)


def test_embedding_edits_are_right_by_full_forwards(llama):
    pairs = make_pairs()
    result = mk.activation_patching(llama, pairs, whole_vocabulary(pairs), site="embed", over="pos", progress=False)
    assert result.provenance["replay"] == "full: an edit before the first block"
    same = mk.activation_patching(
        llama, pairs, whole_vocabulary(pairs), site="resid_pre", over="layer pos", layers=[0], progress=False
    )
    assert torch.allclose(result.values, same.values[0], atol=1e-10, equal_nan=True)


def test_state_space_model_falls_back_and_is_right():
    config = AutoConfig.for_model(
        "mamba", vocab_size=D_VOCAB, hidden_size=16, num_hidden_layers=3, state_size=4, intermediate_size=32
    )
    torch.manual_seed(0)
    model = mk.HookedModel.from_hf(AutoModelForCausalLM.from_config(config).double().eval(), name="mamba")
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    result = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
    assert result.provenance["replay"].startswith("full: ")
    check_residual_by_hand(model, pairs, metric, result)


def test_encoder_falls_back_and_is_right():
    config = AutoConfig.for_model(
        "bert",
        vocab_size=D_VOCAB,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    hf = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").double().eval()
    for p in hf.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    model = mk.HookedModel.from_hf(hf, name="bert")
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    result = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
    assert result.provenance["replay"].startswith("full: ")
    check_residual_by_hand(model, pairs, metric, result)
    # In an encoder a position to the left of the first difference does change: nothing may be presumed there.
    assert float((result.values[2, 1, 0] - result.baseline["corrupted"][0]).abs()) > 1e-6


def check_residual_by_hand(model, pairs, metric, result):
    for j, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(clean[None])
            for layer in range(model.n_layers):
                for pos in range(len(clean)):

                    def write(x, hook, layer=layer, pos=pos, cache=cache):
                        x = x.clone()
                        x[:, pos] = cache[f"blocks.{layer}.hook_in"][:, pos]
                        return x

                    logits = model.bridge.run_with_hooks(
                        corrupted[None], fwd_hooks=[(f"blocks.{layer}.hook_in", write)]
                    )
                    expected = metric.read(logits[:, metric.positions[j]], torch.tensor([j]), None)
                    assert torch.allclose(result.values[layer, pos, j], expected[0].to(result.values.dtype), atol=1e-9)


def model_that_looks_right(block: int = 2) -> mk.HookedModel:
    """A llama in which one block mixes in the mean of all positions: not causal, and nothing in its config says so."""
    hf = build_hf("llama")
    forward = hf.model.layers[block].forward

    def looks_right(hidden_states, *args, **kwargs):
        return forward(hidden_states + 0.3 * hidden_states.mean(1, keepdim=True), *args, **kwargs)

    hf.model.layers[block].forward = looks_right
    return mk.HookedModel.from_hf(hf, name="looks right")


def test_a_model_that_breaks_causality_is_caught():
    model, pairs = model_that_looks_right(), make_pairs()
    metric = whole_vocabulary(pairs)
    arguments = {"site": "resid_pre", "over": "layer pos", "progress": False}
    result = mk.activation_patching(model, pairs, metric, **arguments)
    assert result.provenance["replay"].startswith("full: the two runs differ before their first")
    slow = mk.activation_patching(model, pairs, metric, replay=False, **arguments)
    assert torch.allclose(result.values, slow.values, atol=1e-10, equal_nan=True)


def test_a_proof_is_not_trusted_beyond_its_sweep():
    """Late layers and absent positions prove nothing about earlier layers and other positions."""
    model, pairs = model_that_looks_right(1), make_pairs(((LENGTH, 4), (LENGTH, 2)))
    metric = whole_vocabulary(pairs)
    arguments = {"site": "resid_pre", "over": "layer pos", "progress": False}
    mk.activation_patching(model, pairs, metric, layers=[2, 3], positions=[5, 6], **arguments)
    everything = mk.activation_patching(model, pairs, metric, **arguments)
    slow = mk.activation_patching(model, pairs, metric, replay=False, **arguments)
    assert torch.allclose(everything.values, slow.values, atol=1e-10)
    ragged = make_pairs(((LENGTH, 4), (5, 1)))
    for positions in ([6], [0], [6, 0]):
        found, expected = (
            mk.activation_patching(
                model, ragged, whole_vocabulary(ragged), positions=positions, replay=replay, **arguments
            )
            for replay in (True, False)
        )
        assert torch.allclose(found.values, expected.values, atol=1e-10, equal_nan=True)


def test_torch_hooks_on_modules_that_plain_blocks_lack_are_honoured():
    model, pairs = make_model("llama"), make_pairs()
    metric = whole_vocabulary(pairs)
    before = mk.activation_patching(model, pairs, metric, progress=False)
    handles = [
        block.mlp.register_forward_hook(lambda module, args, output: output * 0) for block in model.bridge.blocks
    ]
    hooked = mk.activation_patching(model, pairs, metric, progress=False)
    slow = mk.activation_patching(model, pairs, metric, progress=False, replay=False)
    assert torch.allclose(hooked.values, slow.values, atol=1e-12)
    assert not torch.allclose(hooked.values, before.values, atol=1e-2)
    for handle in handles:
        handle.remove()
    assert mk.activation_patching(model, pairs, metric, progress=False).provenance["replay"] == "suffix"


@pytest.mark.parametrize("site", ["z", "result"])
def test_of_overlapping_edits_the_later_one_wins(llama, site):
    pairs = make_pairs(((LENGTH, 2),))
    metric = whole_vocabulary(pairs)
    dims = {"z": (1, 1, 1, 1), "result": (1, 1, 1, 1)}[site]
    zero = {"zero": {(site, 1): torch.zeros(dims, dtype=torch.float64)}}
    all_heads, one = mk.Edit(site, 1, "zero"), mk.Edit(site, 1, head=0)
    rest = [(*(mk.Edit(site, 1, "zero", head=h) for h in (1, 2, 3)), one), (mk.Edit(site, 1, "zero"),)]
    cells = [(all_heads, one), (one, all_heads), (mk.Edit(site, 1, head=2),), *rest]
    found = mk.sweep(llama, pairs.corrupted, cells, metric, source=pairs.clean, values=zero, progress=False)
    assert torch.allclose(found.values[0], found.values[3], atol=1e-10)  # zero all but one
    assert torch.allclose(found.values[1], found.values[4], atol=1e-10)  # zero all
    assert float((found.values[0] - found.values[1]).abs()) > 1e-3
    whole = mk.sweep(
        llama, pairs.corrupted, cells, metric, source=pairs.clean, values=zero, progress=False, replay=False
    )
    assert torch.allclose(found.values, whole.values, atol=1e-10)
    with pytest.raises(ValueError, match="edited twice at the same place"):
        mk.sweep(llama, pairs.corrupted, [(one, one)], metric, source=pairs.clean, progress=False)
    both = (mk.Edit("resid_post", 1), mk.Edit("resid_pre", 2, pos=3))
    with pytest.raises(ValueError, match="are the same activation"):
        mk.sweep(llama, pairs.corrupted, [both], metric, source=pairs.clean, progress=False)


def test_a_sweep_inside_hooks_honours_them(llama):
    """Plain blocks have no hook points: with foreign hooks attached, nothing may be skipped, whatever was proved before."""
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    without = mk.activation_patching(llama, pairs, metric, progress=False)
    with llama.hooks([(("mlp_out", 3), lambda x, hook: x * 0.5)]):
        inside = mk.activation_patching(llama, pairs, metric, progress=False)
        slow = mk.activation_patching(llama, pairs, metric, progress=False, replay=False)
    assert inside.provenance["replay"] == "full: other hooks are attached to the model"
    assert torch.allclose(inside.values, slow.values, atol=1e-12)
    assert not torch.allclose(inside.values, without.values, atol=1e-3)


def test_weights_that_change_after_a_proof_are_used():
    model, pairs = make_model("llama"), make_pairs()
    metric = whole_vocabulary(pairs)
    before = mk.activation_patching(model, pairs, metric, progress=False)
    with torch.no_grad():
        model.bridge.blocks[3].mlp.out.original_component.weight.mul_(0.5)
    fast = mk.activation_patching(model, pairs, metric, progress=False)
    slow = mk.activation_patching(model, pairs, metric, progress=False, replay=False)
    assert torch.allclose(fast.values, slow.values, atol=1e-10)
    assert not torch.allclose(fast.values, before.values, atol=1e-3)


def test_runs_without_a_graph_and_leaves_parameters_alone(llama):
    pairs = make_pairs()
    result = mk.activation_patching(llama, pairs, whole_vocabulary(pairs), progress=False)
    assert not result.values.requires_grad
    assert all(p.grad is None for p in llama.bridge.original_model.parameters())
    assert not llama.has_hooks


# -- wrong input -------------------------------------------------------------------------------------------------------


def test_refuses_training_mode():
    hf = build_hf("llama").train()
    model = mk.HookedModel.from_hf(hf)
    pairs = make_pairs()
    with pytest.raises(ValueError, match="expected evaluation mode, got training mode"):
        mk.activation_patching(model, pairs, whole_vocabulary(pairs), progress=False)
    mk.activation_patching(model.eval(), pairs, whole_vocabulary(pairs), layers=[3], progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "zz"}, "site: expected one of"),
        ({"over": "layer banana"}, "over: expected dims among"),
        ({"over": "head"}, "expected 'layer' among the dims"),
        ({"site": "resid_pre", "over": "layer head"}, "has axes"),
        ({"over": "layer layer"}, "each dim once"),
        ({"over": "layer pos position"}, "one of 'pos' and 'position'"),
        ({"site": "embed", "over": "layer"}, "outside the layers"),
        ({"layers": [99]}, "layers: expected indices into 4"),
        ({"heads": [4]}, "heads: expected indices into 4"),
        ({"site": "k", "heads": [2]}, "heads: expected indices into 2"),
        ({"over": "layer", "heads": [0]}, "heads: given, but"),
        ({"over": "layer position", "positions": ["S7"]}, "expected names among"),
        ({"direction": "sideways"}, "direction: expected"),
        ({"budget": -1}, "budget: expected a positive"),
        ({"positions": ["END"]}, "positions: given, but pos or position is not among the dims"),
        ({"over": "layer pos", "positions": ["END"]}, "positions: expected indices into 7, got 'END'"),
        ({"layers": [3, -1]}, "each once"),
        ({"layers": [1.7]}, r"layers\[0\]: expected a whole number"),
        ({"site": "pattern", "over": "layer neuron"}, "no 'neuron'"),
    ],
)
def test_refuses_wrong_arguments(llama, arguments, message):
    pairs = make_pairs()
    with pytest.raises(ValueError, match=message):
        mk.activation_patching(llama, pairs, whole_vocabulary(pairs), progress=False, **arguments)
    assert not llama.has_hooks


def test_refuses_tokens_and_metrics_that_do_not_fit(llama):
    pairs = make_pairs()
    with pytest.raises(ValueError, match="made for 1 prompts, but there are 3"):
        mk.activation_patching(llama, pairs, whole_vocabulary(pairs[[0]]), progress=False)
    far = mk.PromptPairs(pairs.clean, pairs.corrupted, ((D_VOCAB,),) * 3, ((1,),) * 3)
    with pytest.raises(ValueError, match=f"answer tokens in 0..{D_VOCAB - 1}"):
        mk.activation_patching(llama, far, mk.logit_diff(far), progress=False)
    strange = mk.PromptPairs.from_tokens([[3, 999]], [[4, 999]], [(5, 6)])
    with pytest.raises(ValueError, match=f"token ids in 0..{D_VOCAB - 1}"):
        mk.activation_patching(llama, strange, mk.logit_diff(strange), progress=False)
    with pytest.raises(ValueError, match="expected PromptPairs"):
        mk.activation_patching(llama, pairs.clean, whole_vocabulary(pairs), progress=False)
    with pytest.raises(TypeError, match=r"metric: expected .*a Metric"):
        mk.activation_patching(llama, pairs, "logit_diff", progress=False)


def test_nan_in_a_run_names_where_it_began():
    model = make_model("llama")
    with torch.no_grad():
        model.bridge.blocks[2].mlp.out.original_component.weight[0, 0] = torch.nan
    pairs = make_pairs()
    with pytest.raises(
        ValueError, match=r"base run: .*nan for prompt 0; the first is NaN in mlp_out of layer 2, positions 0, 1"
    ):
        mk.activation_patching(model, pairs, whole_vocabulary(pairs), progress=False)
    assert not model.has_hooks


def test_nan_in_an_edit_is_not_an_answer(llama):
    pairs = make_pairs()
    bad = torch.full((1, 1, llama.d_model), torch.nan, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"edited run: the metric is nan for prompt 0 in cell 0 of 1, .* NaN in resid_pre of layer 1"
    ):
        mk.sweep(
            llama,
            pairs.clean,
            [(mk.Edit("resid_pre", 1, "bad"),)],
            whole_vocabulary(pairs),
            values={"bad": {("resid_pre", 1): bad}},
            progress=False,
        )


def test_source_cache_must_be_of_this_model_and_these_prompts(llama):
    pairs = make_pairs(((LENGTH, 2), (LENGTH, 4)))
    metric = whole_vocabulary(pairs)
    tokens = torch.stack(pairs.clean.tokens)
    _, cache = llama.run_with_cache(tokens, "z")
    given = mk.activation_patching(llama, pairs, metric, source_cache=cache, progress=False)
    computed = mk.activation_patching(llama, pairs, metric, progress=False)
    assert torch.allclose(given.values, computed.values, atol=1e-11)
    _, foreign = mk.HookedModel.from_hf(build_hf("llama", seed=1)).run_with_cache(tokens, "z")
    with pytest.raises(ValueError, match="source_cache: expected a cache of"):
        mk.activation_patching(llama, pairs, metric, source_cache=foreign, progress=False)
    _, partly = llama.run_with_cache(tokens, "z", positions=[2])
    with llama.hooks([(("resid_pre", 0), lambda x, hook: x * 2)]):
        _, hooked = llama.run_with_cache(tokens, "z")
    for unfit in (partly, hooked):
        with pytest.raises(ValueError, match="all positions of a plain run"):
            mk.activation_patching(llama, pairs, metric, source_cache=unfit, progress=False)
    _, elsewhere = llama.run_with_cache(tokens, "q")
    with pytest.raises(ValueError, match="holds no 'z' of layer"):
        mk.activation_patching(llama, pairs, metric, source_cache=elsewhere, progress=False)
    for wrong in (tokens[:1], torch.cat([tokens, tokens[:, :1]], 1)):  # would broadcast; would misalign
        _, other = llama.run_with_cache(wrong, "z")
        with pytest.raises(ValueError, match="exactly the 2 source prompts"):
            mk.activation_patching(llama, pairs, metric, source_cache=other, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "zz", "layer": 0}, "site: expected one of"),
        ({"site": "z", "layer": -1}, "layer: expected an index of 0 or more"),
        ({"site": "z", "layer": 0, "pos": -1}, "pos: expected positions of 0 or more"),
        ({"site": "resid_pre", "layer": 0, "head": 1}, "no heads"),
        ({"site": "pattern", "layer": 0, "neuron": 1}, "its last axis is no unit"),
    ],
)
def test_edits_that_have_no_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mk.Edit(**arguments)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (mk.Edit("z", 99), "layer: expected an index into 4"),
        (mk.Edit("z", 0, head=9), "head: site 'z' has 4 heads, got index 9"),
        (mk.Edit("mlp_post", 0, neuron=999), "has 48 entries, got index 999"),
        (mk.Edit("z", 0, pos=(1, 2)), "one for each of 3 prompts; got 2"),
        (mk.Edit("z", 0, "nowhere"), "values: there is none under 'nowhere'"),
        (mk.Edit("z", 0, "wrong"), "expected axes .* got shape"),
    ],
)
def test_edits_that_do_not_fit_are_refused(llama, edit, message):
    pairs, values = make_pairs(), {"wrong": {("z", 0): torch.zeros(5, 1, 1, 1)}}
    with pytest.raises(ValueError, match=message):
        mk.sweep(llama, pairs.clean, [(edit,)], whole_vocabulary(pairs), source=pairs.corrupted, values=values)


def test_metrics_of_other_pairs_and_runs_are_refused(llama):
    pairs, longer = make_pairs(((LENGTH, 2),)), make_pairs(((LENGTH - 2, 2),))
    with pytest.raises(ValueError, match="prompts of other lengths"):
        mk.activation_patching(llama, pairs, mk.logit_diff(longer), progress=False)
    with pytest.raises(ValueError, match="compares with the corrupted run, but only clean is run here"):
        mk.ablation(llama, pairs, mk.kl_divergence(pairs, reference="corrupted"), progress=False)
    with pytest.raises(ValueError, match="source: an edit takes its value from the source run"):
        mk.sweep(llama, pairs.clean, [(mk.Edit("z", 0),)], mk.logit_diff(pairs))


def test_out_of_memory_while_recording_halves_the_prompts(llama, monkeypatch):
    pairs = make_pairs(((LENGTH, 2), (LENGTH, 4), (LENGTH, 3), (LENGTH, 1)))
    metric = whole_vocabulary(pairs)
    expected = mk.activation_patching(llama, pairs, metric, progress=False)
    record, sizes = _sweep.record, []

    def small_device(model, tokens, *args, **kwargs):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("on purpose")
        sizes.append(len(tokens))
        return record(model, tokens, *args, **kwargs)

    monkeypatch.setattr(_sweep, "record", small_device)
    found = mk.activation_patching(llama, pairs, metric, progress=False)
    assert torch.allclose(found.values, expected.values, atol=1e-11)
    assert 1 <= max(sizes) <= 2


@pytest.mark.cuda
def test_cuda_equals_cpu(cuda):
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    on_cpu = mk.activation_patching(make_model("llama"), pairs, metric, over="layer pos head", progress=False)
    model = mk.HookedModel.from_hf(build_hf("llama").to(cuda))
    on_gpu = mk.activation_patching(model, pairs, metric, over="layer pos head", progress=False)
    assert torch.allclose(on_cpu.values, on_gpu.values, atol=1e-10, equal_nan=True)
