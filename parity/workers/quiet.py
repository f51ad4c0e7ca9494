"""Loaded in the fork server before bitsandbytes: keeps its word on a kernel off the terminal.

It would download that one, and nothing here uses it; it says so as soon as it loads where there is AVX512-BF16.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
