"""Train a continual learner: `python main.py --model mgser_sam --dataset seq-digits`."""

import sys

from flatcl.utils.commands.train import main
from flatcl.utils.console import leave

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
