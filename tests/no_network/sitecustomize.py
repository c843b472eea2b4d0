"""Forbids network access to the tests and to the processes that they start.

Python imports a module of this name at start-up if its folder is on PYTHONPATH, where `conftest.py` puts it.
"""

import ipaddress
import socket


class NetworkForbiddenError(AssertionError):
    """A test, or a process that it started, tried to use the network."""


def _check(host) -> None:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return
    try:
        # Servers listen on unspecified addresses.
        address = ipaddress.ip_address(host.partition("%")[0])
        if address.is_loopback or address.is_unspecified:
            return
    except ValueError:
        pass
    raise NetworkForbiddenError(f"expected no network in a test, got a connection to {host}")


def forbid_network() -> None:
    """Replaces the functions that open connections and look up names; connections to this machine still work."""
    if getattr(socket, "_network_is_forbidden", False):
        return
    socket._network_is_forbidden = True

    def guarded(name):
        original = getattr(socket.socket, name)

        def guard(self, *args):
            # (host, port, ...) is the last argument of connect and connect_ex, and of sendto.
            address = args[-1]
            if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
                _check(address[0])
            return original(self, *args)

        return guard

    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, guarded(name))
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        _check(host)
        return look_up(host, *args, **kwargs)

    socket.getaddrinfo = getaddrinfo


forbid_network()
