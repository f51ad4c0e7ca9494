"""The tool's files are found by their names, as when it is run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
