"""Where a run computes and in which precision; accelerate brings the device, the processes and the fp16 gradient scaler."""

import torch
from accelerate import Accelerator

from sdlora.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def for_training(precision: str) -> tuple[Accelerator, torch.dtype]:
    """The accelerator, and the dtype of the frozen base. Precision is ours: accelerate only scales the gradients under fp16."""
    device, dtype = chosen(precision)
    if dtype == torch.float16 and device.type != "cuda":
        what = f"fp16 needs a CUDA GPU for its gradient scaler; this run would be on {device.type}"
        raise UserError("E-CONF-06", what, "train.precision", "use auto, bf16 or fp32")
    return Accelerator(mixed_precision="fp16" if dtype == torch.float16 else "no", cpu=device.type == "cpu"), dtype


def chosen(precision: str) -> tuple[torch.device, torch.dtype]:
    """The device that a run takes, and the dtype of the frozen base there."""
    device = _device()
    if precision == "auto":
        precision = "bf16" if _computes_bf16(device) else "fp32" if device.type != "cuda" else "fp16"
    return device, DTYPES[precision]


def for_pictures() -> tuple[torch.device, torch.dtype]:
    """Device and dtype of generation: fp32 where pictures are compared bit for bit on a CPU, fp16 on a GPU as other programs do it."""
    device = _device()
    return device, torch.float16 if device.type == "cuda" else torch.float32


def free_bytes(device: torch.device) -> int | None:
    """Memory that nothing holds yet, where the device says it."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
