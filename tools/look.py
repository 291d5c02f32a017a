"""Say what is in a file of weights, and the command that would use it: the same as `s3dit look`.

    python tools/look.py z_image_turbo-Q4_K_M.gguf
    python tools/look.py models/Z-Image-Turbo --json

Exit code: 0 it is of a model, 2 it is not, and one line says what it is.
"""

import sys

from s3dit.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main(["look", *sys.argv[1:]]))
