"""What one named GPU of each architecture can do at most: the cards that estimates are for."""

from typing import NamedTuple

__all__ = ["PEAK_RATES", "PeakRates"]

# Of each of the four schedulers of a multiprocessor, a warp instruction a clock.
SCHEDULERS = 4

WARP_SIZE = 32

# Of one multiprocessor of sm_80, sm_90 and sm_100, as are the next three.
MAX_WARPS = 64
MAX_PROGRAMS = 32
NUM_REGISTERS = 65536

# Registers are given to a warp by multiples of so many a thread.
REGISTER_UNIT = 8

# Shared memory that every program takes beside its own.
RESERVED_BYTES = 1024


class PeakRates(NamedTuple):
    """What one GPU can do at most, which stands for its architecture.

    gpu: the card. multiprocessors: of it. clock: Hz. bandwidth: bytes/s. peak: FLOP/s by precision.
    shared_bytes: shared memory that one program may have. source: where the figures are from.
    """

    gpu: str
    multiprocessors: int
    clock: float
    bandwidth: float
    peak: dict[str, float]
    shared_bytes: int
    source: str

    def issue_us(self, warp_instructions: float) -> float:
        """ESTIMATE of a lower bound: every scheduler of the card issues in every clock."""
        return 1e6 * warp_instructions / (self.multiprocessors * SCHEDULERS * self.clock)

    def bytes_us(self, num_bytes: float) -> float:
        """Time that so many bytes take to and from memory."""
        return 1e6 * num_bytes / self.bandwidth

    def arithmetic_us(self, flops: float, precision: str) -> float:
        """Time that so many operations take at the peak."""
        return 1e6 * flops / self.peak[precision]

    def programs_per_multiprocessor(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Programs (CTAs) that fit one multiprocessor at a time.

        registers: of one thread. shared_bytes: of one program.
        """
        of_thread = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
        return min(
            NUM_REGISTERS // (of_thread * WARP_SIZE * num_warps),
            (self.shared_bytes + RESERVED_BYTES) // (shared_bytes + RESERVED_BYTES),
            MAX_WARPS // num_warps,
            MAX_PROGRAMS,
        )


def _peak(bf16: float, fp32: float) -> dict[str, float]:
    """Tensor cores multiply TF32 at half the rate of 16-bit numbers on all three."""
    return {"bf16": bf16, "fp16": bf16, "tf32": bf16 / 2, "fp32": fp32}


PEAK_RATES = {
    "sm_80": PeakRates(
        "A100 80 GB SXM",
        108,
        1.41e9,
        2.039e12,
        _peak(312e12, 19.5e12),
        163 * 1024,
        "NVIDIA A100 datasheet and architecture whitepaper, published",
    ),
    "sm_90": PeakRates(
        "H100 SXM",
        132,
        1.755e9,
        3.0e12,
        _peak(800e12, 67e12),
        227 * 1024,
        "copy and bf16 product as measured on an H100, 1.755 GHz assumed; fp32 from NVIDIA's H100 "
        "datasheet",
    ),
    "sm_100": PeakRates(
        "B200",
        148,
        1.856e9,
        8e12,
        _peak(2250e12, 80e12),
        227 * 1024,
        "NVIDIA Blackwell architecture brief, HGX B200, dense, published; the clock is that at "
        "which 148 multiprocessors of 8192 FLOP a clock reach the published bf16 rate",
    ),
}
