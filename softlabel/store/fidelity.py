"""What an encoding loses of the teachers' answers, measured while they are stored."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from softlabel.store.strict_json import OMIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """KL(teacher || decoded) in nats at T = 1 and at the store's temperature, over the measured rows: of documents over
    `positions` labelled positions."""

    mean_t1: float
    worst_t1: float
    mean_t: float
    worst_t: float
    positions: int | None = field(default=None, metadata=OMIT)

    @staticmethod
    def total(parts: Iterable[tuple[int, "Fidelity | None"]]) -> "Fidelity | None":
        """Combine the fidelity of several shards, weighed by (rows, fidelity) or positions; None: none was measured."""
        known = [(rows, part) for rows, part in parts if part is not None and rows]
        if by_position := all(part.positions is not None for _, part in known):
            known = [(part.positions, part) for _, part in known if part.positions]
        if not known:
            return None
        rows = sum(count for count, _ in known)
        return Fidelity(
            mean_t1=sum(count * part.mean_t1 for count, part in known) / rows,
            worst_t1=max(part.worst_t1 for _, part in known),
            mean_t=sum(count * part.mean_t for count, part in known) / rows,
            worst_t=max(part.worst_t for _, part in known),
            positions=rows if by_position else None,
        )
