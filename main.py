"""Train a continual learner: `python main.py --model mgser_sam --dataset seq-digits`."""

import sys

from flatcl.utils.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
