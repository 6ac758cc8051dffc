"""How fast training goes: tokens per second, model FLOP utilisation, memory."""

import time

import psutil
import torch

# Dense bfloat16 FLOP/s of a device, from its maker's data sheet.
_PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
}


class Meter:
    """Measures between two calls of `row`.

    Args:
        flops_per_token: of student and teacher together; None leaves the utilisation out.
        devices: how many share the work.
    """

    def __init__(self, flops_per_token: float | None, device: torch.device, devices: int):
        self.flops_per_token, self.device, self.devices = flops_per_token, device, devices
        self._since, self._tokens = time.monotonic(), 0
        self._peak = _peak(device)

    def add(self, tokens: int) -> None:
        """So many tokens, on all devices together, were trained on."""
        self._tokens += tokens

    def row(self) -> dict[str, float]:
        """tokens_per_second and memory_gib since the last call; mfu where the device's peak is known."""
        now = time.monotonic()
        speed = self._tokens / max(now - self._since, 1e-9)
        self._since, self._tokens = now, 0
        row = {"tokens_per_second": speed, "memory_gib": self._memory() / 2**30}
        if self.flops_per_token is not None and self._peak is not None:
            row["mfu"] = speed * self.flops_per_token / (self._peak * self.devices)
        return row

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK.items() if part in name), None)
