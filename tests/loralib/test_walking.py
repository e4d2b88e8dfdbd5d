"""A model's modules, against torch's own walk."""

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loralib.walking import named_modules


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from("abc")), max_size=12))
def test_names_order_and_modules_are_those_of_torch(edges):
    """Also where a module stands in several places, where one is taken out again, and in a model that holds itself."""
    modules = [nn.Module() for _ in range(8)]
    for number, (parent, key) in enumerate(edges):
        setattr(modules[parent], key, modules[number % 8] if number % 5 else None)
    for model in modules:
        assert named_modules(model) == list(model.named_modules())
