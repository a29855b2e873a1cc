"""Where a run computes, in which precision, and what memory there allows; accelerate brings the device, the processes and the fp16 gradient
scaler."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdlora import processes
from sdlora.errors import RESOURCES, UserError

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OUT_OF_MEMORY = (
    "out of memory",  # CUDA's allocator, driver and runtime, HIP, XPU, MPS
    "_status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER and the others of their kind
    "cudnn_status_not_supported",  # what some versions of cuDNN say where the workspace of a convolution does not fit
    "cudaerrormemoryallocation",
    "can't allocate memory",  # torch on a CPU, under Linux and macOS
    "not enough memory",  # the same under Windows
    "allocation failed",  # HPU
)
"""What errors say, in small letters, where memory did not suffice."""


def for_training(precision: str) -> tuple[Accelerator, torch.dtype]:
    """The accelerator, and the dtype of the frozen base. Precision is ours: accelerate only scales the gradients under fp16."""
    device, dtype = chosen(precision)
    if dtype == torch.float16 and device.type != "cuda":
        what = f"fp16 needs a CUDA GPU for its gradient scaler; this run would be on {device.type}"
        raise UserError("E-CONF-06", what, "train.precision", "use auto, bf16 or fp32")
    if not (processes.count_of(os.environ) == 1 or torch.distributed.is_initialized()):
        what = "this command works in one process, and a launcher started several"
        raise UserError("E-PROC-06", what, "environment", "start it by itself; `sdlora train` and `sdlora resume` know of launchers")
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


def forget_peak(device: torch.device) -> None:
    """Measure from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes that tensors took at once since then, where the device says it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def used_bytes(device: torch.device) -> int:
    """What tensors take on a device, at their most until now; on the CPU what the whole process takes now."""
    return peak_bytes(device) or int(psutil.Process().memory_info().rss)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on whatever device."""
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in said for text in OUT_OF_MEMORY)
    )


@dataclass(frozen=True)
class Portion:
    """How much goes through a network at once."""

    rows: int
    tiled: bool = False  # the autoencoder takes each picture in tiles

    def halve(self, can_tile: bool) -> "Portion | None":
        """The next smaller one, tiles last; None: there is none."""
        if self.rows > 1:
            return Portion((self.rows + 1) // 2)
        return Portion(1, tiled=True) if can_tile and not self.tiled else None


def compute_in_portions(compute: Callable[[Portion], T], rows: int, what: str, can_tile: bool = False) -> T:
    """`compute`, again from its beginning with half as much at once wherever memory does not suffice, so that all of a result was computed
    alike. Raises `UserError` where one row of `what` does not fit."""
    portion: Portion | None = Portion(max(1, rows))
    reason = ""
    while portion is not None:
        try:
            return compute(portion)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            portion = portion.halve(can_tile)
        clear_device_cache(garbage_collection=True)  # here the error is gone, and with it what its frames held
    tiles = ", not even with the autoencoder in tiles" if can_tile else ""
    todo = "close what else uses this memory, or choose a smaller size"
    raise UserError("E-MEM-03", f"memory does not suffice for one {what}{tiles}: {reason}", "memory", todo, RESOURCES)


def attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Whose kernels compute attention here: `sdpa`, torch's own, or `xformers`. Each is tried, as a version that is installed may not run.

    auto: torch's where one of its kernels runs that keep no attention matrix, else xformers if that does. Raises `UserError` where
    xformers is asked for and does not run.
    """
    if wanted == "sdpa" or (wanted == "auto" and _runs(_fused, device, dtype) is None):
        return "sdpa"
    problem = _runs(_xformers, device, dtype)
    if problem is None:
        return "xformers"
    if wanted == "xformers":
        what = f"xformers computes no attention on this {device.type} in {str(dtype).removeprefix('torch.')}: {problem}"
        raise UserError("E-CONF-11", what, "train.attention", 'set it to auto; or install it: pip install "sdlora[cuda]"')
    return "sdpa"


def _fused(q: torch.Tensor) -> None:
    heads = q.transpose(1, 2)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).sum().backward()  # type: ignore[no-untyped-call]


def _xformers(q: torch.Tensor) -> None:
    importlib.import_module("xformers.ops").memory_efficient_attention(q, q, q).sum().backward()


def _runs(operator: Callable[[torch.Tensor], None], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an operator does not run, forward and backward; None: it does. Queries (B, N, heads, d), as wide as these networks' are."""
    try:
        operator(torch.zeros(1, 64, 2, 64, device=device, dtype=dtype, requires_grad=True))
    except (ImportError, RuntimeError, NotImplementedError, ValueError, AttributeError, OSError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
    return None


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
