"""Which numeric addresses belong to the public internet."""

import functools
import ipaddress

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ALSO_REFUSED = (
    ipaddress.ip_network("192.0.0.0/24"),  # protocol assignments; older Pythons know only parts of it
    ipaddress.ip_network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.ip_network("168.63.129.16/32"),  # Azure's platform service: a public number that answers only inside
    ipaddress.ip_network("3fff::/20"),  # documentation; newer than ipaddress's tables
)


@functools.lru_cache(maxsize=4096)
def is_public(address: str) -> bool:
    """Whether the whole internet can reach ``address``; IPv4 carried in IPv6 (mapped, 6to4, NAT64) is judged as IPv4.

    Loopback, private, link-local, shared (100.64/10), unspecified, multicast, reserved and documentation addresses are
    not public. Raises ``ValueError`` when ``address`` is no number.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None and ip not in _GLOBAL_UNICAST:
            return False
        ip = inner or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in _ALSO_REFUSED))
