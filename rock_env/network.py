"""Network policies: what a sandbox may reach, and the checks of names and addresses. Pure functions, no sockets."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from rock_env.errors import SpecError

PROTOCOLS = ("http", "https", "tcp")
_MAX_RULES = 256
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER_LIKE = re.compile(r"[0-9]+|0x[0-9a-f]*")
_UNICAST_6 = ipaddress.ip_network("2000::/3")  # all that is routed on the internet; leaves out 64:ff9b::/96 (NAT64)


def normalize_host(text: str) -> str:
    """A host as it is compared: a lower-case name without a final dot, or a numeric address in its one usual form.

    Raises ValueError for anything else, and so for what some resolvers read as an address: "127.1", "0x7f.1", "0177.1".
    """
    host = text.lower().removesuffix(".")
    if "%" not in host:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            mapped = getattr(address, "ipv4_mapped", None)
            return str(mapped or address)
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or _NUMBER_LIKE.fullmatch(labels[-1]):
        raise ValueError(f"{text!r} is neither a host name nor a numeric address")
    return host


def is_numeric(host: str) -> bool:
    """Whether a normalized host is an address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the internet's: not loopback, private, link-local (so no cloud's metadata
    service), shared, reserved or multicast, and not an IPv6 form that hides another address.
    """
    ip = ipaddress.ip_address(normalize_host(address))
    if ip.is_multicast or not ip.is_global:
        return False
    return ip.version == 4 or (ip in _UNICAST_6 and ip.teredo is None and ip.sixtofour is None)


@dataclass(frozen=True)
class NetworkRule:
    """One thing that a sandbox may reach.

    Attributes:
      host: a name ("pypi.org"); "*.example.org" for every name below one, but not itself; or a numeric address.
      port: 1..65535.
      protocol: "http" (plain requests), "https" (a tunnel that must begin as TLS for exactly this host) or "tcp" (a
        tunnel for anything: what travels in it is not looked at).
    """

    host: str
    port: int
    protocol: str

    def __post_init__(self) -> None:
        name = self.host.removeprefix("*.") if isinstance(self.host, str) else self.host
        try:
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is not a str")
            normal = normalize_host(name)
            if name != self.host and is_numeric(normal):
                raise ValueError(f"{self.host!r}: addresses have no names below them")
        except ValueError as error:
            raise SpecError(f'network.host: expected a name, "*." and a name, or an address: {error}') from error
        object.__setattr__(self, "host", normal if name == self.host else f"*.{normal}")
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 1 <= self.port <= 65535:
            raise SpecError(f"network.port: expected an integer in 1..65535, got {self.port!r}")
        if self.protocol not in PROTOCOLS:
            raise SpecError(f"network.protocol: expected one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")

    def permits(self, host: str, port: int, protocol: str) -> bool:
        """Whether it covers a normalized host, port and protocol."""
        if (self.port, self.protocol) != (port, protocol):
            return False
        if self.host.startswith("*."):
            return host.endswith(self.host[1:]) and not is_numeric(host)
        return host == self.host


@dataclass(frozen=True)
class NetworkPolicy:
    """An allowlist. Empty (the default) is closed: a network namespace with nothing but loopback, and no proxy.

    A name is allowed as written and resolved outside the sandbox; if it resolves to an address that is not public, it
    is denied unless a rule names that address, too, with the same port and protocol (against DNS rebinding).
    """

    allow: tuple[NetworkRule, ...] = ()

    def __post_init__(self) -> None:
        allow = self.allow
        if not isinstance(allow, tuple | list) or not all(isinstance(rule, NetworkRule) for rule in allow):
            raise SpecError(f"network.allow: expected NetworkRules, got {allow!r}")
        if len(allow) > _MAX_RULES:
            raise SpecError(f"network.allow: expected at most {_MAX_RULES} rules, got {len(allow)}")
        object.__setattr__(self, "allow", tuple(allow))

    @property
    def is_closed(self) -> bool:
        return not self.allow

    def permits(self, host: str, port: int, protocol: str) -> bool:
        """Whether a rule covers a normalized host, port and protocol."""
        return any(rule.permits(host, port, protocol) for rule in self.allow)

    def refusal(self, host: str, port: int, protocol: str, addresses: Iterable[str]) -> str:
        """Why a permitted host may not be connected to at the addresses it resolved to; "" if it may."""
        for address in addresses:
            if not is_public(address) and not self.permits(normalize_host(address), port, protocol):
                return f"{host} resolves to {address}, which is not a public address and not named by the policy"
        return ""

    def to_wire(self) -> list[list]:
        return [[rule.host, rule.port, rule.protocol] for rule in self.allow]

    @classmethod
    def from_wire(cls, rules: Iterable[Iterable]) -> NetworkPolicy:
        return cls(tuple(NetworkRule(*rule) for rule in rules))
