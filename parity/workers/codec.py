"""Loads bitsandbytes, in the fork server: without its word on a kernel that it would download, and nothing here uses.

It says so on the terminal as soon as it loads, on processors that have AVX512-BF16.
"""

import importlib
import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
importlib.import_module("bitsandbytes")
