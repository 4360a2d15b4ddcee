"""`model.run`: the one call by which the library runs a model."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny import make_pairs, model_of


def test_prompts_and_tokens():
    model, prompts = model_of("llama"), make_pairs().clean
    length, ids = max(prompts.by_length().items(), key=lambda item: len(item[1]))
    assert len(ids) > 1
    ids = list(reversed(ids))
    tokens = torch.stack([prompts.tokens[i] for i in ids])
    with torch.no_grad():
        found = model.run(prompts, ids)
        assert found.shape == (len(ids), length, model.d_vocab)
        assert torch.equal(found, model.run(tokens))
        assert torch.equal(found, model.run(prompts[ids]))


def test_prompts_of_several_lengths_do_not_run_together():
    model, prompts = model_of("llama"), make_pairs().clean
    assert len(prompts.by_length()) > 1
    with pytest.raises((ValueError, RuntimeError)):
        model.run(prompts)


def test_hooks_run_too():
    model, prompts = model_of("llama"), make_pairs().clean
    seen = []
    with torch.no_grad(), model.hooks([("blocks.0.hook_resid_post", lambda x, hook: seen.append(x.shape))]):
        model.run(prompts, [0])
    assert len(seen) == 1
