# SPDX-License-Identifier: Apache-2.0
"""Where wandb finds a login."""

import pytest

from effsam3.trackers import has_wandb_login


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


def test_none(home):
    assert not has_wandb_login()


def test_in_the_environment(home, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert has_wandb_login()


def test_in_netrc(home):
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    (home / ".netrc").chmod(0o600)
    assert has_wandb_login()
    (home / ".netrc").write_text("machine example.org\n  login user\n  password k\n")
    assert not has_wandb_login()
