"""Choosing an implementation: by preference, by force, never silently."""

import logging

import pytest
import torch
from qwen3_kernels import dispatch


@pytest.fixture
def operation(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    dispatch._say_once.cache_clear()
    dispatch.register("op", "fast", lambda: "fast", lambda t: "it needs cuda" if t.device.type == "cpu" else None)
    dispatch.register("op", "plain", lambda: "plain")


def test_the_first_that_fits_runs_and_the_log_says_why(operation, caplog):
    with caplog.at_level(logging.INFO, "qwen3_kernels.dispatch"):
        for _ in range(3):
            assert dispatch.choose("op", torch.zeros(1))() == "plain"
    assert [r.message for r in caplog.records] == ["op runs as 'plain' on cpu (not fast: it needs cuda)"]


def test_forcing_what_does_not_fit_is_an_error(operation):
    with pytest.raises(ValueError, match="'fast' was asked for, but it needs cuda"):
        dispatch.choose("op", torch.zeros(1), "fast")
    with dispatch.prefer("op", "fast"), pytest.raises(ValueError, match="it needs cuda"):
        dispatch.choose("op", torch.zeros(1))
    assert dispatch.choose("op", torch.zeros(1))() == "plain"
    with pytest.raises(ValueError, match="no implementation 'none'"), dispatch.prefer("op", "none"):
        pass
