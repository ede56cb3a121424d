"""What tests of models and tables share: a machine without a network."""

import os
import socket

import pytest


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No host has an address, no proxy is set, nothing is cached; whoever asks the Hub all the same fails."""
    from huggingface_hub import constants

    def refuse(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    for key in list(os.environ):
        if key.lower().endswith("_proxy"):
            monkeypatch.delenv(key)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
