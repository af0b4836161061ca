"""The vector with which a client begins: a pure function of its number and of the server's first vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from pfedmoe_mpi.core.parts import Spec, Workbench


class Beginning:
    """The private vectors before a client's first step, drawn when they are asked for.

    `server` holds the parts of the server's vector after what comes before round 1, by name; until it is set,
    every part has the values that it draws.

    Args:
        specs: returns a client's private parts.
        origin: returns the part, private or the server's, whose values a client's private part begins with.
    """

    def __init__(
        self, bench: Workbench, specs: Callable[[int], Spec], origin: Callable[[str, int], str]
    ) -> None:
        self.server: Mapping[str, Tensor] | None = None
        self._bench = bench
        self._specs = specs
        self._origin = origin

    def vector(self, client: int) -> Tensor:
        """Return a client's vector (layout.size,), on the CPU; it changes torch's global generators."""
        spec = self._specs(client)
        vector = self._bench.initial(spec, client)
        if self.server is None:
            return vector
        places = self._bench.layout(spec).parts
        for name, place in places.items():
            origin = self._origin(name, client)
            if origin != name:
                vector[place] = self.server[origin] if origin in self.server else vector[places[origin]]
        return vector

    def needs_server(self, clients: int) -> bool:
        """Return whether a part of any of the clients begins with values of the server."""
        return any(
            self._origin(name, k) not in self._specs(k) for k in range(clients) for name in self._specs(k)
        )
