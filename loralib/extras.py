"""What to install where an optional package is missing."""

# The smallest extra of pyproject.toml that brings a package.
EXTRA_OF = {
    "rich": "report",
    "scipy": "report",
    "sklearn": "report",
    "matplotlib": "report",
    "transformers": "train",
    "accelerate": "train",
    "datasets": "nlu",
    "evaluate": "nlu",
    "yaml": "nlu",
    "shtab": "report",
}


def missing(error: ImportError) -> str:
    """One sentence for a failed import: what is missing and the smallest extra that brings it."""
    package = (error.name or str(error)).partition(".")[0]
    wanted = f"'dylora[{EXTRA_OF[package]}]'" if package in EXTRA_OF else package
    return f"{package} is not installed; run: pip install {wanted}"
