"""The filled cache, and the network guard."""

import socket

import pytest

from moellava.testing import BIOMEDCLIP, TINYLLAMA, fill_hub_cache


def test_options_for_several_repos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 repo ids"):
        fill_hub_cache(tmp_path, [BIOMEDCLIP, TINYLLAMA], seed=1)


def test_blocked_network_refuses_a_connection(no_network):
    with pytest.raises(RuntimeError, match="network was used"):
        socket.create_connection(("localhost", 9))
