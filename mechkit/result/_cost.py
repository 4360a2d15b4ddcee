"""What a result took to compute, counted and not timed."""

from dataclasses import dataclass

from mechkit._check import checked


@checked
@dataclass(frozen=True)
class Cost:
    """The arithmetic behind a result, counted and not timed.

    Args:
        block_tokens: (block, token) pairs that were computed, base runs included.
        naive_block_tokens: what one full forward per cell would have computed.
        proof_block_tokens: how many of `block_tokens` went into checking the replay against whole forward passes.
    """

    block_tokens: int
    naive_block_tokens: int
    proof_block_tokens: int = 0

    @property
    def speedup(self) -> float:
        """How many times fewer block-tokens than one full forward per cell."""
        return self.naive_block_tokens / self.block_tokens if self.block_tokens else float("inf")

    def __str__(self) -> str:
        return f"{self.block_tokens:,} of {self.naive_block_tokens:,} block-tokens ({self._compared()})"

    def _compared(self) -> str:
        if self.naive_block_tokens and f"{self.speedup:.1f}" == "1.0":
            return "as many"
        if self.block_tokens <= self.naive_block_tokens:
            return f"{self.speedup:.1f}x fewer"
        # Of few cells the base runs and the checks cost more than they save.
        included = ", checks included" if self.proof_block_tokens else ""
        if not self.naive_block_tokens:
            return f"more{included}"
        return f"{self.block_tokens / self.naive_block_tokens:.1f}x more{included}"
