"""Which rotation a linear layer's input gets, from its scheme."""

import torch

from fourfold.core.quantization import LayerScheme
from fourfold.formats import BlockTensor, hadamard


def rotation_of(
    scheme: LayerScheme, trained: torch.Tensor | BlockTensor | None, device: torch.device
) -> torch.Tensor | None:
    """The matrix [32, 32] that a layer's input is multiplied by, or None.

    ``trained`` is None in a dry run, which trains nothing: the Hadamard matrix costs as much as any other.
    """
    if scheme.input_transform is None:
        return None
    if scheme.input_transform == "hadamard" or trained is None:
        return hadamard().to(device)
    assert isinstance(trained, torch.Tensor), "a rotation is not held in blocks"
    return trained.to(device, torch.float32)
