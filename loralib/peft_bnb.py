"""PEFT's layers for bitsandbytes, with ranks; imported where bitsandbytes is installed. In a module of their own, so
that pickle finds them."""

from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import bnb as stock

from .within import HasRanks


class Linear8bitLt(HasRanks, stock.Linear8bitLt):
    """On a weight in 8 bits."""


if is_bnb_4bit_available():

    class Linear4bit(HasRanks, stock.Linear4bit):
        """On a weight in 4 bits."""
