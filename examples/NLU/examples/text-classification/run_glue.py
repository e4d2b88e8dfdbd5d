#!/usr/bin/env python
"""Where the released command lines look for run_glue.py: ``transformers_dylora.run_glue``."""

import sys

from transformers_dylora.run_glue import main
from transformers_dylora.stopping import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main, "run_glue.py"))
