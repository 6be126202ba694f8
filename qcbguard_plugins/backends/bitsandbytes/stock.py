"""The stock quantizer itself: which layers it takes, and which codes it stores."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.errors import MissingDependencyError, UnguardableError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.models.skeleton import require_transformers

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

# A multiple of every block size.
_WEIGHTS_PER_RUN = 1 << 20

# Level of each 4-bit code. NF4 codes are sorted; FP4 codes are not, and two of them are zero.
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


def quant_type_of(grid: Grid) -> str:
    """bitsandbytes' word for a grid: ``nf4``, ``fp4`` or ``int8``."""
    return grid.name.partition("-")[0]


def config_for(grid: Grid) -> BitsAndBytesConfig:
    """The stock configuration that quantizes to a grid."""
    config_class = require_transformers().BitsAndBytesConfig
    if quant_type_of(grid) == "int8":
        return config_class(load_in_8bit=True)
    return config_class(load_in_4bit=True, bnb_4bit_quant_type=quant_type_of(grid))


def quantized_layers(skeleton: PreTrainedModel, config: BitsAndBytesConfig) -> dict[str, tuple[Any, bool]]:
    """Which layers the stock quantizer takes: its own answer, given on a model without weights.

    Args:
        skeleton: A model on the meta device; its layers are replaced.
        config: The stock configuration.

    Returns:
        By dotted name the layer that takes the place of the model's, and true where the checkpoint stores
        ``[in_features, out_features]`` (GPT-2's Conv1D).
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
        name: (module, issubclass(module.source_cls, Conv1D))
        for name, module in skeleton.named_modules()
        if isinstance(module, kinds)
    }


def stock_codes(weight: Tensor, grid: Grid) -> Tensor:
    """Quantize with bitsandbytes and read the codes.

    Args:
        weight: Float ``[out_features, in_features]``.
        grid: The grid of one of its formats.

    Returns:
        uint8 ``[out_features, in_features]``, indices into the levels of the grid.
    """
    # The kernels work block by block or row by row, so a run of whole ones has the codes that it has in the weight. In
    # runs the kernels' temporaries, many times the size of what they read, stay small.
    if quant_type_of(grid) == "int8":
        runs = list(torch.split(weight, max(1, _WEIGHTS_PER_RUN // weight.shape[1])))
    else:
        runs = list(torch.split(weight.reshape(-1), _WEIGHTS_PER_RUN))
    codes = map_over_threads(lambda run: _stock_codes_of_run(run, grid), runs)
    return torch.cat(codes).view(weight.shape)


def _stock_codes_of_run(run: Tensor, grid: Grid) -> Tensor:
    functional, quant_type = require_bitsandbytes().functional, quant_type_of(grid)
    if quant_type == "int8":
        return _levels_of_int8(functional.int8_vectorwise_quant(run.half().contiguous())[0])
    block_size = grid.block_size_of((1, run.numel()))
    packed, _ = functional.quantize_4bit(
        run.contiguous(), blocksize=block_size, quant_type=quant_type, compress_statistics=False
    )
    return _unpack(packed, quant_type, run.shape)


def parameter_codes(parameter: Any, shape: torch.Size, grid: Grid) -> Tensor:
    """Read the codes of a quantized parameter, before any forward pass: on some processors one repacks them.

    Args:
        parameter: A ``Params4bit`` or ``Int8Params`` of bitsandbytes.
        shape: Shape of the weight that it was made from, ``[out_features, in_features]``.
        grid: Grid of its format.

    Returns:
        uint8 in that shape, indices into the levels of the grid.
    """
    if quant_type_of(grid) != "int8":
        return _unpack(parameter.data.view(torch.uint8), quant_type_of(grid), shape)
    if parameter.dtype != torch.int8:
        # llm_int8_has_fp16_weight keeps the weight and quantizes it at each forward pass.
        return stock_codes(parameter.data, grid)
    return _levels_of_int8(parameter.data)


def repacks_on_this_processor() -> bool:
    """True where the first forward pass replaces 4-bit weights by a layout of this processor."""
    require_bitsandbytes()
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


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
