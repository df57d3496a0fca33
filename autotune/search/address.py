"""Whether anything answers at a Ray address, asked before Ray is: it would try for more than a minute."""

import re
import socket

from autotune.errors import ClusterError, shown

_CONNECT_SECONDS = 5.0
_HOST_AND_PORT = re.compile(r"(?:[a-z]+://)?(?:\[([0-9A-Fa-f:.]+)\]|([^/:\[\]\s]+)):(\d{1,5})(?:/.*)?")


def require_reachable(address: str) -> None:
    """Check that somebody listens there. Addresses without a host, such as `auto`, are left to Ray.

    Raises:
        ClusterError: nobody does, or it is no address of Ray.
    """
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None:
        if address in ("auto", "local") or re.fullmatch(r"[a-z]+://\S*", address):
            return
        raise ClusterError(f"found address {shown(address)}; write HOST:PORT, ray://HOST:PORT, or auto")
    try:
        socket.create_connection((match[1] or match[2], int(match[3])), _CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ClusterError(
            f"Ray at {address} cannot be reached ({reason}); check that the cluster runs and its port is open"
        ) from None
