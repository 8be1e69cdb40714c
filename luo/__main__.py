"""``python -m luo`` is the ``luo`` command."""

from luo.cli import main

main(prog_name="luo")
