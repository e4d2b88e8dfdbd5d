"""At r = r_max the layers give microsoft/LoRA's numbers, and its state dicts load."""

import pytest
import torch

import loralib as lora

CASES = {
    "Linear": ((6, 8), {"r": 4, "lora_alpha": 3}, (5, 6)),
    "Linear, fan_in_fan_out": ((6, 8), {"r": 4, "lora_alpha": 3, "fan_in_fan_out": True}, (5, 6)),
    "MergedLinear": ((6, 9), {"r": 2, "lora_alpha": 3, "enable_lora": [True, False, True]}, (5, 2, 6)),
    "Embedding": ((10, 8), {"r": 4, "lora_alpha": 3}, None),
    "Conv2d": ((4, 6, 3), {"r": 2, "lora_alpha": 3, "padding": 1}, (5, 4, 6, 6)),
    "Conv1d": ((4, 6, 1), {"r": 2, "lora_alpha": 3}, (5, 4, 6)),
    "Conv3d": ((4, 6, 1), {"r": 2, "lora_alpha": 3}, (5, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_and_gradients(microsoft, name, tmp_path):
    args, options, shape = CASES[name]
    kind = name.split(",")[0]
    theirs, ours = getattr(microsoft, kind)(*args, **options), getattr(lora, kind)(*args, **options)
    for factor in (theirs.lora_A, theirs.lora_B):
        torch.nn.init.normal_(factor)
    assert ours.lora_A.shape == theirs.lora_A.shape and ours.lora_B.shape == theirs.lora_B.shape
    torch.save(theirs.state_dict(), tmp_path / "theirs.bin")
    ours.load_state_dict(torch.load(tmp_path / "theirs.bin", weights_only=True))
    x = torch.randint(0, 10, (5, 3)) if shape is None else torch.randn(shape)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    for factor in ("lora_A", "lora_B"):
        found, wanted = getattr(ours, factor).grad, getattr(theirs, factor).grad
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_its_bin_state_dict_loads_into_an_injected_model(microsoft, tmp_path):
    theirs = torch.nn.Sequential(
        microsoft.Linear(6, 8, r=4, lora_alpha=4), microsoft.MergedLinear(8, 6, r=2, enable_lora=[True, True])
    )
    ours = torch.nn.Sequential(
        lora.Linear(6, 8, r=4, lora_alpha=4), lora.MergedLinear(8, 6, r=2, enable_lora=[True, True])
    )
    for layer in theirs:
        torch.nn.init.normal_(layer.lora_B)
    for mine, yours in zip(ours, theirs, strict=True):
        mine.weight.data, mine.bias.data = yours.weight.data.clone(), yours.bias.data.clone()
    torch.save(microsoft.lora_state_dict(theirs), tmp_path / "adapter.bin")
    assert lora.load_adapter(ours, tmp_path / "adapter.bin") == []
    x = torch.randn(3, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert lora.lora_state_dict(ours).keys() == microsoft.lora_state_dict(theirs).keys()
