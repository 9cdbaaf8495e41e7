"""The tests' own guard: nothing reaches beyond this machine, and a try is noticed."""

from __future__ import annotations

import socket
import urllib.request

import pytest


@pytest.mark.parametrize("reach", [
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),                    # addresses for documentation
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
    lambda: socket.getaddrinfo("example.org", 443),
    lambda: urllib.request.urlopen("http://example.org", timeout=1),
])
def test_the_network_is_refused(reach, no_network):
    with pytest.raises(OSError, match="use no network"):
        reach()
    assert len(no_network) == 1
    no_network.clear()


def test_loopback_is_not(no_network):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert no_network == []
