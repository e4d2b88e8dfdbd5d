"""What a key of an adapter's file is of: a factor, a weight of an adapted layer itself, or a module saved beside."""

import re

_FACTOR = re.compile(r"(.*)\.(lora_(?:embedding_)?)([AB])((?:\.weight)?)")


def factor_in(key: str) -> tuple[str, str] | None:
    """The layer's part of the key, and which factor it is, "A" or "B"; None for what is no factor. The ending tells,
    since a layer may be called lora_A itself."""
    found = _FACTOR.fullmatch(key)
    return (found[1], found[3]) if found else None


def other_half(key: str) -> str:
    """The key of lora_B for that of lora_A, and the other way round."""
    layer, kind, factor, ending = _FACTOR.fullmatch(key).groups()  # type: ignore[union-attr]  # of a factor
    return f"{layer}.{kind}{'BA'['AB'.index(factor)]}{ending}"


def is_of_base(key: str) -> bool:
    """Whether it is a weight of an adapted layer itself, which PEFT calls its base layer."""
    return ".base_layer." in key and factor_in(key) is None
