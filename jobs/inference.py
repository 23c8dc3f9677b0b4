"""Label boxes as a Ray job.

ray job submit --working-dir . -- python jobs/inference.py -e SPEC [section.key=value ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the working directory that was submitted

from mal.cli import main

if __name__ == "__main__":
    sys.exit(main(["inference", *sys.argv[1:]]))
