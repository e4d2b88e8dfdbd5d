"""The part of the metadata that is computed: the README for those who read it outside of the repository."""

import re
from pathlib import Path

from setuptools import setup


def outside(text: str) -> str:
    """The README without pictures and links of the repository; what is on the web stays linked."""
    text = re.sub(r"!\[[^\]]*\]\((?!https?://)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?://)[^)]*\)", r"\1", text)


readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
setup(long_description=outside(readme), long_description_content_type="text/markdown")
