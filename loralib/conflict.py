"""microsoft/LoRA's package installs under the same import name as this one."""

import importlib.metadata
import sys


def warn_of_other_loralib() -> None:
    """Say on stderr what to do if the distribution ``loralib`` is installed beside ours, whose files it overwrites."""
    try:
        other = importlib.metadata.version("loralib")
    except importlib.metadata.PackageNotFoundError:
        return
    print(
        f"loralib {other} (microsoft/LoRA) is installed too, and both packages are imported as loralib; run: "
        f"pip uninstall loralib && pip install --force-reinstall --no-deps dylora",
        file=sys.stderr,
    )
