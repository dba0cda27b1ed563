# SPDX-License-Identifier: Apache-2.0
"""What stands between a run and wandb."""

import socket

import pytest

from effsam3.trackers import wandb_obstacle


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    """A port on this machine that takes connections, as wandb's host."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield listening


def test_no_login(home, server):
    assert wandb_obstacle() == "no login"


def test_a_key_in_the_environment(home, server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_obstacle() == ""


def test_a_key_in_netrc(home, server):
    (home / ".netrc").write_text("machine 127.0.0.1\n  login user\n  password k\n")
    (home / ".netrc").chmod(0o600)
    assert wandb_obstacle() == ""
    (home / ".netrc").write_text("machine example.org\n  login user\n  password k\n")
    assert wandb_obstacle() == "no login"


def test_no_connection(home, server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    server.close()
    assert "127.0.0.1 cannot be reached" in wandb_obstacle()
