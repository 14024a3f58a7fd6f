"""What a few accelerators can do at most, from their makers' data sheets.

FLOP/s are those of dense 16-bit (bfloat16) matrix products; data sheets often print twice as much, "with
sparsity". A server reaches a part of either number; for a ratio of two models that part cancels out.
"""

from dataclasses import dataclass

from vocabext.errors import UsageError


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: What to call it on the command line.
        flops_per_second: Dense 16-bit matrix products.
        bytes_per_second: To and from its memory.
        memory_bytes: Its memory; None if unknown.
        source: Where the numbers are from.
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: float | None
    source: str


DEVICES = {device.name: device for device in (
    Device("h200", 989e12, 4.8e12, 141e9, "NVIDIA H200 Tensor Core GPU data sheet (SXM), half of the value with "
           "sparsity"),
    Device("h100", 989e12, 3.35e12, 80e9, "NVIDIA H100 Tensor Core GPU data sheet (SXM5), half of the value with "
           "sparsity"),
    Device("h100-pcie", 756e12, 2.0e12, 80e9, "NVIDIA H100 Tensor Core GPU data sheet (PCIe), half of the value with "
           "sparsity"),
    Device("a100", 312e12, 2.039e12, 80e9, "NVIDIA A100 Tensor Core GPU data sheet (SXM4, 80 GB)"),
    Device("l40s", 362e12, 864e9, 48e9, "NVIDIA L40S data sheet, value without sparsity"),
    Device("l4", 121e12, 300e9, 24e9, "NVIDIA L4 Tensor Core GPU data sheet, half of the value with sparsity"),
    Device("a10", 125e12, 600e9, 24e9, "NVIDIA A10 Tensor Core GPU data sheet, value without sparsity"),
    Device("mi300x", 1307e12, 5.3e12, 192e9, "AMD Instinct MI300X data sheet, value without sparsity"),
)}


def find_device(
    name: str | None, *, flops_per_second: float | None = None, bytes_per_second: float | None = None,
    memory_bytes: float | None = None,
) -> Device:
    """Look a device up, or take the numbers given.

    Args:
        name: One of `DEVICES`, or any name if both speeds are given.
        flops_per_second: Replaces the device's.
        bytes_per_second: Replaces the device's.
        memory_bytes: Replaces the device's.

    Raises:
        UsageError: If a speed is neither known nor given.
    """
    known = DEVICES.get((name or "").lower())
    flops = flops_per_second or (known.flops_per_second if known else None)
    bandwidth = bytes_per_second or (known.bytes_per_second if known else None)
    if flops is None or bandwidth is None:
        what = f"there is no device {name!r} here" if name else "no device was named"
        raise UsageError(f"{what}; choose from {', '.join(DEVICES)}, or pass both --flops and --bandwidth")
    if not 0 < flops < float("inf") or not 0 < bandwidth < float("inf"):
        raise UsageError(f"--flops {flops:g} and --bandwidth {bandwidth:g} must be numbers above 0")
    changed = flops_per_second or bytes_per_second
    source = "given on the command line" if known is None or changed else known.source
    return Device(name or "custom", flops, bandwidth, memory_bytes or (known.memory_bytes if known else None), source)
