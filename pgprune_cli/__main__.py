"""python -m pgprune_cli"""

from pgprune_cli.cli import main

main()
