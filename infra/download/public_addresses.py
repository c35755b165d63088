"""Classification of IP addresses as public or not."""

import functools
import ipaddress

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_EXCLUDED = (
    ipaddress.ip_network("192.0.0.0/24"),  # protocol assignments; older versions of Python cover only parts of it
    ipaddress.ip_network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.ip_network(
        "168.63.129.16/32"
    ),  # Azure's platform service: a public address that is reachable only inside Azure
    ipaddress.ip_network("3fff::/20"),  # documentation; newer than the tables of ipaddress
)


@functools.lru_cache(maxsize=4096)
def is_public(address: str) -> bool:
    """Return True if the numeric ``address`` belongs to the public internet.

    Loopback, private, link-local, shared (100.64/10), unspecified, multicast, reserved and documentation addresses are
    not public. IPv4 embedded in IPv6 (mapped, 6to4, NAT64) is classified as IPv4. Raises ``ValueError`` if ``address``
    is not an IP address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is None and ip not in _GLOBAL_UNICAST:
            return False
        ip = embedded or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in _EXCLUDED))
