"""The stock quantizer itself: which layers it takes, and which codes it stores."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.errors import MissingDependencyError, UnguardableError, UsageError
from qcbguard_plugins.grids import CodebookGrid, Grid, Int8Grid
from qcbguard_plugins.models.skeleton import require_transformers

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

# Level of each 4-bit code. NF4 codes are sorted; FP4 codes are not, and two of them are zero.
# A multiple of every block size.
_WEIGHTS_PER_RUN = 1 << 20

_LEVEL_OF_CODE = {
    "nf4": tuple(range(16)),
    "fp4": (7, 8, 13, 14, 11, 12, 9, 10, 7, 6, 1, 0, 3, 2, 5, 4),
}


def require_bitsandbytes() -> Any:
    """The bitsandbytes module, its notice about an optional kernel silenced.

    Raises:
        MissingDependencyError: bitsandbytes or transformers is missing or too old.
    """
    require_transformers()
    try:
        import bitsandbytes
        import bitsandbytes.functional
    except ImportError as error:
        raise MissingDependencyError(
            f"bitsandbytes is needed: {error}", remedy="pip install 'qcbguard-plugins[bnb]'"
        ) from error
    return bitsandbytes


def format_of(config: BitsAndBytesConfig) -> str:
    """The format that a bitsandbytes configuration stands for: ``nf4``, ``fp4`` or ``int8``.

    Raises:
        UnguardableError: It asks for neither 4 nor 8 bits, or for an unknown 4-bit type.
    """
    method = config.quantization_method()
    if method is None:
        raise UnguardableError(
            "the configuration quantizes nothing that can be guarded",
            remedy="Set load_in_4bit=True with bnb_4bit_quant_type='nf4' or 'fp4', or load_in_8bit=True.",
        )
    return "int8" if method == "llm_int8" else method


def config_for(format_name: str) -> BitsAndBytesConfig:
    """The stock configuration that quantizes to a format.

    Raises:
        UsageError: The format is none of bitsandbytes.
    """
    config_class = require_transformers().BitsAndBytesConfig
    if not isinstance(get_grid(format_name), (CodebookGrid, Int8Grid)):
        raise UsageError(f"bitsandbytes does not quantize to {format_name}", remedy="Use nf4, fp4 or int8.")
    if format_name == "int8":
        return config_class(load_in_8bit=True)
    return config_class(load_in_4bit=True, bnb_4bit_quant_type=format_name.split("-")[0])


def quantized_layers(skeleton: PreTrainedModel, config: BitsAndBytesConfig) -> dict[str, bool]:
    """Which layers the stock quantizer takes: its own answer, given on a model without weights.

    Args:
        skeleton: A model on the meta device; its layers are replaced.
        config: The stock configuration.

    Returns:
        Dotted layer names, each with true where the checkpoint stores ``[in_features, out_features]`` (GPT-2's Conv1D).
    """
    bitsandbytes = require_bitsandbytes()
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    quantizer_class = Bnb4BitHfQuantizer if config.load_in_4bit else Bnb8BitHfQuantizer
    quantizer = quantizer_class(config, pre_quantized=False)
    quantizer.preprocess_model(model=skeleton, device_map=None)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {
        name: issubclass(module.source_cls, Conv1D)
        for name, module in skeleton.named_modules()
        if isinstance(module, kinds)
    }


def stock_codes(weight: Tensor, format_name: str) -> Tensor:
    """Quantize with bitsandbytes and read the codes.

    Args:
        weight: Float ``[out_features, in_features]``.
        format_name: ``nf4``, ``fp4``, ``int8`` or one with a block size.

    Returns:
        uint8 ``[out_features, in_features]``, indices into the levels of the format's grid.
    """
    grid = get_grid(format_name)
    # The kernels work block by block or row by row, so a run of whole ones has the codes that it has in the weight. In
    # runs the kernels' temporaries, many times the size of what they read, stay small.
    if isinstance(grid, CodebookGrid):
        flat = weight.reshape(-1)
        runs = list(torch.split(flat, _WEIGHTS_PER_RUN))
    else:
        runs = list(torch.split(weight, max(1, _WEIGHTS_PER_RUN // weight.shape[1])))
    codes = map_over_threads(lambda run: _stock_codes_of_run(run, grid), runs)
    return torch.cat(codes).view(weight.shape)


def _stock_codes_of_run(run: Tensor, grid: Grid) -> Tensor:
    functional = require_bitsandbytes().functional
    if not isinstance(grid, CodebookGrid):
        return _levels_of_int8(functional.int8_vectorwise_quant(run.half().contiguous())[0])
    packed, _ = functional.quantize_4bit(
        run.contiguous(), blocksize=grid.block_size, quant_type=grid.quant_type, compress_statistics=False
    )
    return _unpack(packed, grid.quant_type, run.shape)


def parameter_codes(parameter: Any, shape: torch.Size, grid: Grid) -> Tensor:
    """Read the codes of a quantized parameter, before any forward pass: on some processors one repacks them.

    Args:
        parameter: A ``Params4bit`` or ``Int8Params`` of bitsandbytes.
        shape: Shape of the weight that it was made from, ``[out_features, in_features]``.
        grid: Grid of its format.

    Returns:
        uint8 in that shape, indices into the levels of the grid.
    """
    if isinstance(grid, CodebookGrid):
        return _unpack(parameter.data.view(torch.uint8), grid.quant_type, shape)
    if parameter.dtype != torch.int8:
        # llm_int8_has_fp16_weight keeps the weight and quantizes it at each forward pass.
        return stock_codes(parameter.data, grid.name)
    return _levels_of_int8(parameter.data)


def silence_notices() -> None:
    """Keep bitsandbytes from printing a line for each 8-bit layer's call."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _unpack(packed: Tensor, quant_type: str, shape: torch.Size) -> Tensor:
    """Levels of two codes a byte, the first in the high half; both are looked up at once."""
    levels = torch.tensor(_LEVEL_OF_CODE[quant_type], dtype=torch.uint8)
    byte = torch.arange(256)
    pairs = torch.stack((levels[byte >> 4], levels[byte & 0xF]), dim=1).view(torch.int16).view(-1)
    unpacked = pairs.to(packed.device)[packed.reshape(-1).int()].view(torch.uint8)
    return unpacked[: shape.numel()].view(shape)


def _levels_of_int8(codes: Tensor) -> Tensor:
    return (codes.to(torch.int16) + 127).to(torch.uint8)
